#!/usr/bin/env bash
# The policy of this folder from nothing: demonstrations by scripted experts, random weights, training, evaluation.
#
#     make policy          # or: bash examples/policy.sh OUTPUT
#
# Hours on a CPU (finetune's --compile makes them fewer where there is a C++ compiler). Every command continues where it
# was stopped, and so does this script. To see it through in minutes:
#
#     TASKS=drawer-open-v3 EPISODES=8 STEPS=4 COOLING=2 EVALUATED=1 VARIED=1 make policy
set -euo pipefail
output=${1:-outputs/policy}
tasks=${TASKS:-mt10}

# Noise of up to 2.4 cm (standard deviation) in a step: the expert shows the way back. Ambiguous scenes make words count.
openvla record --tasks "$tasks" --axis none,language --episodes "${EPISODES:-300}" --noise 0.6 --after-success 2 --paraphrases \
    --workers 2 --output "$output/demos"
[ -f "$output/fresh/config.json" ] || python examples/fresh_policy.py "$output/fresh"

# Without augmentation: camera, light and table are always the same.
learning=(--strategy full --dataset "$output/demos" --name metaworld --held-out 0.03 --no-image-aug --batch-size 64
    --precision bf16 --optimizer muon --weight-decay 0.05 --shuffle-buffer 20000 --workers 1 --save-every 500 --eval-every 1000)
openvla finetune --model "$output/fresh" "${learning[@]}" --learning-rate 2e-3 --warmup-steps 150 \
    --steps "${STEPS:-7000}" --output "$output/learned" --resume
openvla finetune --model "$output/learned" "${learning[@]}" --learning-rate 2e-3 --schedule linear --warmup-steps 20 \
    --steps "${COOLING:-1700}" --output "$output/cooled" --resume

openvla package "$output/package" --weights "$output/cooled" --name metaworld --overwrite

openvla evaluate --model "$output/package" --tasks "$tasks" --episodes "${EVALUATED:-50}" --output "$output/loop"
openvla evaluate --model "$output/package" --tasks "$tasks" --episodes "${VARIED:-20}" --axis all --output "$output/axes"
