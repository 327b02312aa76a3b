#!/usr/bin/env bash
# Four policies of the same demonstrations, samples and seeds, which differ in what one prediction is: one action or eight,
# words or numbers, one camera or two and the state. All start from the policy of the package. Plans in the demonstrations
# are late (--delay), as answers will be. studies/chunks.py compares them in the closed loop.
#
#     bash studies/chunks.sh outputs/chunks
#     python studies/chunks.py docs/results/chunks --policies outputs/chunks
#
# Every command continues where it was stopped. POLICY=l1 trains that one alone, so that several machines can share;
# PRECISION=float32 on a CPU without bfloat16. MORE=360: afterwards tokens drive, the expert says what they should have done
# (DAgger), twice, and all learn that as well, into outputs/chunks/corrected: tokens gain, L1 does not (docs/LOG.md).
set -euo pipefail
output=${1:-outputs/chunks}
tasks=${TASKS:-drawer-open-v3,push-v3,button-press-topdown-v3}

openvla record --tasks "$tasks" --episodes "${EPISODES:-330}" --noise 0.2 --delay 4 --after-success 6 --wrist \
    --workers "${WORKERS:-2}" --output "$output/demos"

declare -A what=(
    [one]=""
    [tokens]="--chunk 8"
    [l1]="--chunk 8 --head l1_regression --prefix-training 5"
    [l1_wrist]="--chunk 8 --head l1_regression --prefix-training 5 --cameras primary,wrist --state"
)
learn() { # POLICY FOLDER OPTIONS. Without augmentation: camera, light and table are always the same.
    openvla finetune --strategy full --held-out 0.03 --no-image-aug --batch-size 64 --precision "${PRECISION:-bf16}" \
        --optimizer muon --weight-decay 0.05 --schedule linear --shuffle-buffer 20000 --workers "${READERS:-1}" \
        --output "$output/$2" --resume ${what[$1]} "${@:3}"
}
for policy in ${POLICY:-one tokens l1 l1_wrist}; do
    learn "$policy" "$policy" --dataset "$output/demos" --name metaworld --learning-rate 1.5e-3 --warmup-steps 20 \
        --steps "${STEPS:-1140}" --save-every 285 --eval-every 285
done

test -n "${MORE:-}" || exit 0
driven() { # STUDENT SEED TASKS EPISODES FOLDER
    openvla record --tasks "$3" --episodes "$4" --student "$output/$1" --unnorm-key metaworld --latency 0.1 --seed "$2" \
        --after-success 6 --wrist --output "$output/$5"
}
correct() { # POLICY FOLDER MIXTURE: each from its demonstrations on
    learn "$1" "$2" --model "$output/$1" --dataset "$output/$3" --learning-rate 7e-4 --warmup-steps 10 --steps "$MORE" \
        --save-every 180 --eval-every 180
}
# Pushing is what chunks did worst, then pressing. A recording alone would have units of its own.
driven tokens 9000 push-v3 "${DRIVEN:-90}" driven_push
driven tokens 9000 button-press-topdown-v3,drawer-open-v3 "${OTHERS:-45}" driven_rest
cat > "$output/mixture.yaml" <<END
metaworld: {path: demos}
driven_push: {path: driven_push, weight: 4, statistics: metaworld}
driven_rest: {path: driven_rest, weight: 2, statistics: metaworld}
END
correct tokens student mixture.yaml
driven student 9300 button-press-topdown-v3 "${PRESSED:-120}" driven_button
driven student 9300 push-v3 "${PUSHED:-60}" driven_push_again
sed 's/weight: 4/weight: 3/' "$output/mixture.yaml" > "$output/mixture_again.yaml"
cat >> "$output/mixture_again.yaml" <<END
driven_button: {path: driven_button, weight: 3, statistics: metaworld}
driven_push_again: {path: driven_push_again, weight: 3, statistics: metaworld}
END
for policy in ${POLICY:-tokens one l1 l1_wrist}; do
    correct "$policy" "corrected/$policy" mixture_again.yaml
done
