#!/usr/bin/env bash
# Four policies of the same demonstrations, samples and seeds, which differ in what one prediction is: one action or eight,
# words or numbers, one camera or two and the state. studies/chunks.py compares them in the closed loop.
#
#     bash studies/chunks.sh outputs/chunks
#     python studies/chunks.py docs/results/chunks --policies outputs/chunks
#
# Every command continues where it was stopped. POLICY=l1 trains that one alone, so that several machines can share.
set -euo pipefail
output=${1:-outputs/chunks}

openvla record --tasks "${TASKS:-drawer-open-v3,push-v3,button-press-topdown-v3}" --episodes "${EPISODES:-150}" --noise 0.6 \
    --after-success 2 --wrist --workers 2 --output "$output/demos"
[ -f "$output/fresh/config.json" ] || python examples/fresh_policy.py "$output/fresh"

declare -A what=(
    [one]=""
    [tokens]="--chunk 8"
    [l1]="--chunk 8 --head l1_regression --prefix-training 5"
    [l1_wrist]="--chunk 8 --head l1_regression --prefix-training 5 --cameras primary,wrist --state"
)
for policy in ${POLICY:-one tokens l1 l1_wrist}; do
    # Without augmentation: camera, light and table are always the same.
    openvla finetune --model "$output/fresh" --strategy full --dataset "$output/demos" --name metaworld --held-out 0.03 \
        --no-image-aug --batch-size 64 --precision bf16 --optimizer muon --weight-decay 0.05 --learning-rate 2e-3 \
        --schedule linear --warmup-steps 150 --steps "${STEPS:-2500}" --shuffle-buffer 20000 --workers 1 \
        --save-every 500 --eval-every 500 --output "$output/$policy" --resume ${what[$policy]}
done
