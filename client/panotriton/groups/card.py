"""A data set's README.md: what it holds, how it was made, and what may be done with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from panotriton import __version__
from panotriton.groups.plan import Plan

if TYPE_CHECKING:
    from panotriton.groups.dataset import Summary

__all__ = ["data_card"]

_HOLDS = {
    "folder": "One folder a group, `group_0001/` …: pairs, sequences and cameras as files, and "
    "`group_info.json` about them. `results.json` lists all groups.",
    "webdataset": "`data/*.tar`, one a group, and in it one sample for each kept interval: `.json` (key, "
    "cameras, scores), `.txt` (description), `.p1_00.jpg` … `.p2_10.jpg` (both sequences, left to right).\n\n"
    '```python\nimport glob, webdataset\nsamples = webdataset.WebDataset(sorted(glob.glob("data/*.tar")), '
    'shardshuffle=False).decode("rgb")\n```',
    "parquet": "`data/*.parquet`, one a group, and in it one row for each view of a kept interval: the "
    "image, its camera, its pair's scores, the interval's description.\n\n"
    "```python\nimport datasets\n"
    'views = datasets.load_dataset("parquet", data_files="data/*.parquet")\n```\n\n'
    "```sql\nselect interval, avg(final_score) from 'data/*.parquet' group by interval\n```",
}


def data_card(plan: Plan, summary: Summary, license_name: str, suffix: str) -> str:
    """The card, with the head that Hugging Face reads."""
    options = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in plan.options.items())
    weights = "\n".join(f"| {name} | `{value}` |" for name, value in plan.weights.items())
    return f"""\
---
license: {json.dumps(license_name)}
tags: [panorama, multi-view, super-resolution]
{_files(suffix)}---

# Sequences of views in pairs of panoramas

Sequences of views between two cameras in pairs of panoramas, super-resolved, scored and described by
generative models: made by panotriton {__version__}, not photographed.

| | |
|---|---|
| groups | {summary.groups} |
| intervals kept | {summary.intervals_kept} |
| intervals dropped | {summary.intervals_dropped} |
| pairs that failed | {summary.failed} |
| panoramas | {len(plan.panoramas)} |
| bytes | {summary.bytes} |

## What is in it

{_HOLDS[plan.layout]}

## How it was made

Pairs of panoramas in the order of seed {plan.seed}; `dataset.json` lists the panoramas with their checksums.
A group's key is a checksum over its panoramas, its seed, these options and these weights.

| option | |
|---|---|
{options}

| weights | |
|---|---|
{weights or "| not named by the servers | |"}

Of each pair, intervals below the threshold in either panorama were dropped. Scores and descriptions are a
model's words, checked by nobody.

## License

{license_name}. The panoramas' own licenses apply as well.
"""


def _files(suffix: str) -> str:
    if not suffix:
        return ""
    return f"configs:\n- config_name: default\n  data_files: data/*{suffix}\n"
