#!/usr/bin/env bash
# Open question of the paper: out-of-distribution detection. FixMatch, FlexMatch and SoftMatch on CIFAR-10, alone and
# with CalibrateMix; how well their confidence, energy and the like tell CIFAR-10's test images from those of SVHN and
# CIFAR-100 (AUROC, AUPR and FPR at 95 % TPR, by validate.py, into OUTPUT/ood).
# Settings: as table1_cifar10.sh. 250 labels and both other sets are our choice. OOD_DATASETS="A B" names others, with
# OOD_DATA_DIR as their --data-dir (default: they come from the hub). At SCALE=smoke, which has the digits alone, their
# training images stand in for something else: an AUROC about 0.5 is right.
# The paper's figures: none.
# Measured by us: with other sets, by validate.py on the runs of variants.sh at SCALE=cpu (results/README.md). SVHN and
# CIFAR-100 were not run. Time: not measured.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
checkpoints=()
for algorithm in fixmatch flexmatch softmatch; do
    for variant in '' +calibratemix; do
        for seed in $SEEDS; do
            run "$algorithm$variant-seed$seed" --num-labels "$labels" --algorithm "$algorithm" --seed "$seed" \
                ${variant:+--calibratemix}
            checkpoints+=("$OUTPUT/$algorithm$variant-seed$seed/last")
        done
    done
done

flags=()
case $SCALE in
    paper) ;;
    cpu) flags=(--device cpu --workers 0) ;;
    smoke) flags=(--device cpu --workers 0 --ood-split train) OOD_DATASETS=digits OOD_DATA_DIR='' ;;
esac
if [ -n "${OOD_DATA_DIR:-}" ]; then flags+=(--ood-data-dir "$OOD_DATA_DIR"); fi
report
# shellcheck disable=SC2086
after python "$here/validate.py" --checkpoint "${checkpoints[@]}" --ood-dataset ${OOD_DATASETS:-svhn cifar100} \
    --results-dir "$OUTPUT/ood" ${flags[@]+"${flags[@]}"}
