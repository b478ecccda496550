#!/usr/bin/env bash
# FixMatch alone and with CalibrateMix on 200 of the bundled digits, 20 of them labeled, and 500 to test.
# Two runs of 1,600 updates, then a table, a picture and a CSV file in output/quickstart. So few images let FixMatch
# learn its own mistakes by heart. CalibrateMix joins for the second half, with half its weight. Flags go to both runs:
#   bash launch/quickstart.sh --seed 1
# OUTPUT=DIR puts the runs elsewhere; a run that is there already is not repeated, and one that was stopped goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=${OUTPUT:-"$here/output/quickstart"}
# The network is far too small to share out over threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() {
    python "$here/train_ssl.py" --dataset digits --train-split 'train[:200]' --num-labels 20 --model wide_resnet10_1 \
        --bn-momentum 0.1 --batch-size 8 --mu 4 --epochs 8 --train-steps-per-epoch 200 --calmix-warmup-epochs 4 \
        --calmix-weight 0.5 --model-ema-warmup --workers 2 --device cpu --log-interval 200 --val-interval 4 \
        --output "$output" --resume auto "$@" > /dev/null
}

train --experiment fixmatch "$@"
train --experiment fixmatch+calibratemix --calibratemix "$@"
python "$here/report.py" "$output/fixmatch" "$output/fixmatch+calibratemix" --output "$output"
