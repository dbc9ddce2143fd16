"""A study so small that a test can run it."""

import yaml

TINY = {
    "families": ["reach", "separate"],
    "thresholds": {"separate": 0.14},
    "video_episodes": {"reach": 3, "separate": 2},
    "labelled_episodes_per_family": 2,
    "held_out_episodes": 1,
    "quantizer_steps": 2,
    "pretraining_steps": 2,
    "inverse_dynamics_steps": 2,
    "finetuning_candidates": [[2, 1e-3]],
    "temperatures": [1.0],
    "validation_rollouts": 1,
    "rollouts_per_family": 2,
}
STUDY = {
    "title": "tiny",
    "seeds": [1],
    "settings": TINY,
    "columns": {"in-domain": {"video": "arm", "labelled": "all"}},
    "methods": ["scratch", "lapa"],
    "splits": ["seen"],
}


def write(folder, **changes):
    """A study file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes), encoding="utf-8")
    return str(path)
