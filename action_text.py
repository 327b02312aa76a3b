"""A predicted action in words: what its numbers are called, as a record for programs and as lines for people."""

from typing import Any


POSE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
MEANINGS = ("translation",) * 3 + ("rotation",) * 3 + ("1 open, 0 closed",)


def action_names(action_dim: int) -> list[str]:
    """Names of the numbers of an action: the end-effector pose and the gripper for seven, `action[i]` otherwise."""
    return list(POSE_NAMES) if action_dim == len(POSE_NAMES) else [f"action[{index}]" for index in range(action_dim)]


def action_record(prediction: Any, **context: Any) -> dict[str, Any]:
    """A prediction as plain numbers, ready for JSON.

    Args:
        prediction: `ActionPrediction` of one sample, from `predict_action(..., return_dict=True)`.
        context: What else belongs to it: `unnorm_key`, `instruction`, `image`, `model`.

    Returns:
        `action` in the units of the dataset, `names`, `normalized` in [-1, 1], `probabilities` of the chosen tokens,
        `confidence` (the lowest of them), and the context.
    """
    probabilities = [round(float(probability), 6) for probability in prediction.token_probabilities]
    return {
        "action": [float(number) for number in prediction.actions],
        "names": action_names(len(prediction.actions)),
        "normalized": [float(number) for number in prediction.normalized_actions],
        "probabilities": probabilities,
        "confidence": min(probabilities),
        **context,
    }


def action_lines(record: dict[str, Any]) -> str:
    """The record as a small table, one line for each number."""
    names = record["names"]
    meanings = MEANINGS if tuple(names) == POSE_NAMES else ("",) * len(names)
    width = max(map(len, names))
    lines = [
        f"  {name:<{width}}  {number:+.5f}  {probability:4.0%}  {meaning}".rstrip()
        for name, number, probability, meaning in zip(
            names, record["action"], record["probabilities"], meanings, strict=True
        )
    ]
    least = names[record["probabilities"].index(record["confidence"])]
    lines.append(f"confidence {record['confidence']:.0%}, that of the least certain number ({least})")
    if record.get("unnorm_key"):
        lines.append(f"units of '{record['unnorm_key']}', per step; metres and radians in most Open-X datasets")
    return "\n".join(lines)
