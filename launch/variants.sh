#!/usr/bin/env bash
# FixMatch, FlexMatch and SoftMatch with everything that is there against overconfidence: label smoothing, the
# logit-margin penalty (as its authors' code has it), random mixup at equal weights, and the presets of CalibrateMix; of
# the paper's also mask-scale, which chooses pseudo-labels by sharper logits.
# ALGORITHMS and VARIANTS name fewer of them; --dataset and the flags of a small set run it on that.
# Settings: as table1_cifar10.sh. CIFAR-10 with 250 labels is our choice; --dataset and --num-labels change it.
# The paper's figures: none. Measured by us: at SCALE=cpu, and on small sets, in results/README.md.
# Time: at SCALE=cpu two minutes a run in bfloat16 on one core of an Intel Xeon with AMX.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

ALGORITHMS=${ALGORITHMS:-fixmatch flexmatch softmatch}
VARIANTS=${VARIANTS:-alone label-smoothing logit-margin random-mixup paper mask-scale authors-code ours steered}

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
for algorithm in $ALGORITHMS; do
    for variant in $VARIANTS; do
        case $variant in
            alone) flags=() ;;
            label-smoothing) flags=(--label-smoothing 0.1) ;;
            logit-margin) flags=(--logit-margin-penalty 0.1 --logit-margin-rows agreeing) ;;
            random-mixup) flags=(--calibratemix --calmix-pairing random --calmix-gamma 0.5) ;;
            paper | authors-code | ours | steered) flags=(--calibratemix --calmix-preset "$variant") ;;
            mask-scale) flags=(--calibratemix --calmix-mask-scale 1.5) ;;
            *) fail "VARIANTS: $variant is no preset, nor alone label-smoothing logit-margin random-mixup mask-scale" ;;
        esac
        run_seeds "$algorithm-$variant" --num-labels "$labels" --algorithm "$algorithm" ${flags[@]+"${flags[@]}"}
    done
done
report
