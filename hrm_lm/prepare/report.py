"""What a preparation says at its end: what was left out, why, and where."""

from typing import Any

import numpy as np

from hrm_lm.prepare.tasks import EXAMPLES, Job


def merge_drops(job: Job, surveyed: list[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was dropped, by reason: how many records, and examples as {place, text}.

    surveyed: the survey's results, which know how many lines each piece has: a place is counted from the file's start.
    results: each part's result of a step; the results of a further step may follow them.
    """
    lines_before = {}  # (part, number of the piece) -> lines of the file before the piece
    last_file, before = None, 0
    for part, result in enumerate(surveyed):
        for number, (piece, lines) in enumerate(zip(job.parts[part], result["lines"])):
            before = before if (piece.source, piece.path) == last_file else 0
            lines_before[part, number] = before
            last_file, before = (piece.source, piece.path), before + lines
    merged: dict[str, dict[str, Any]] = {}
    for i, result in enumerate(results):
        part = i % len(job.parts)
        for reason, drop in result["drops"].items():
            total = merged.setdefault(reason, {"count": 0, "examples": []})
            total["count"] += drop["count"]
            for number, position, text in drop["examples"][: EXAMPLES - len(total["examples"])]:
                place = f"{job.parts[part][number].path}:{lines_before[part, number] + position}"
                total["examples"].append({"place": place.removesuffix(":0"), "text": text})
    return merged


def by_source(
    job: Job, groups: np.ndarray, duplicates: dict[int, np.ndarray], written: list[dict[str, Any]]
) -> dict[str, dict[str, int]]:
    """What became of each source's pairs. `train` counts a pair as often as it was written.

    groups: (parts, GROUPS), pairs. duplicates: arrays (parts,). written: results of `write_shard`.
    """
    sources: dict[str, dict[str, int]] = {}
    for part, result in enumerate(written):
        counts = {
            "pairs": int(groups[part].sum()),
            "duplicates": sum(int(again[part]) for again in duplicates.values()),
            "over_cap": result["over_cap"],
            **{split: result["shards"].get(split, {"samples": 0})["samples"] for split in ("train", "val")},
        }
        total = sources.setdefault(job.source(part).name, dict.fromkeys(counts, 0))
        for name, count in counts.items():
            total[name] += count
    return sources


def describe(reasons: dict[str, dict[str, Any]]) -> str:
    """`not JSON 3 (a.jsonl:7), ...`"""
    return ", ".join(f"{reason} {drop['count']:,} ({drop['examples'][0]['place']})" for reason, drop in reasons.items())
