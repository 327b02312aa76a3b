#!/usr/bin/env bash
# Four policies of the same demonstrations, samples and seeds, which differ in what one prediction is: one action or eight,
# words or numbers, one camera or two and the state. All start from the policy of the package. Plans in the demonstrations
# are late (--delay), as answers will be. studies/chunks.py compares them in the closed loop.
#
#     bash studies/chunks.sh outputs/chunks
#     python studies/chunks.py docs/results/chunks --policies outputs/chunks
#
# Every command continues where it was stopped. POLICY=l1 trains that one alone, so that several machines can share;
# PRECISION=float32 on a CPU without bfloat16.
set -euo pipefail
output=${1:-outputs/chunks}

openvla record --tasks "${TASKS:-drawer-open-v3,push-v3,button-press-topdown-v3}" --episodes "${EPISODES:-330}" --noise 0.2 \
    --delay 4 --after-success 6 --wrist --workers "${WORKERS:-2}" --output "$output/demos"

declare -A what=(
    [one]=""
    [tokens]="--chunk 8"
    [l1]="--chunk 8 --head l1_regression --prefix-training 5"
    [l1_wrist]="--chunk 8 --head l1_regression --prefix-training 5 --cameras primary,wrist --state"
)
for policy in ${POLICY:-one tokens l1 l1_wrist}; do
    # Without augmentation: camera, light and table are always the same.
    openvla finetune --strategy full --dataset "$output/demos" --name metaworld --held-out 0.03 \
        --no-image-aug --batch-size 64 --precision "${PRECISION:-bf16}" --optimizer muon --weight-decay 0.05 \
        --learning-rate 1.5e-3 --schedule linear --warmup-steps 20 --steps "${STEPS:-1140}" --shuffle-buffer 20000 \
        --workers "${READERS:-1}" --save-every 285 --eval-every 285 --output "$output/$policy" --resume ${what[$policy]}
done
