#!/usr/bin/env bash
# FixMatch alone and with CalibrateMix on 200 of the bundled digits, 20 of them labeled, and 500 to test.
# Two runs of 800 updates, then a table, pictures and CSV files in output/quickstart. So few images leave FixMatch surer
# than it is right. CalibrateMix joins after a fifth of the updates, from where on pseudo-labels are chosen by sharper
# logits, as mixing takes confidence from all images (--calmix-mask-scale). The setting was chosen on training images
# that the runs leave out (results/README.md). Flags go to both runs:
#   OUTPUT=output/seed1 bash launch/quickstart.sh --seed 1
# OUTPUT=DIR puts the runs elsewhere, which other flags need. A finished run is not repeated, a stopped one goes on.
# It has one scale, and one seed. Time: 46 s on two idle cores of a shared AMD EPYC server.
SCALE=own
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

recipe=(
    --dataset digits --train-split 'train[:200]' --num-labels 20 --model wide_resnet10_1 --bn-momentum 0.1
    -b 8 --mu 4 --epochs 4 --train-steps-per-epoch 200 --calmix-warmup-epochs 0.8
    --model-ema-warmup --workers 2 --device cpu --log-interval 200
)
run fixmatch
run fixmatch+calibratemix --calibratemix --calmix-mask-scale 1.5
report
