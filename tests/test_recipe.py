"""`prepare --sources`: tags in front of prompts, caps and repetition, source by source."""

import json
import re
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from hrm_lm.commands.prepare import main
from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.chat import Chat
from hrm_lm.data.prepared.writer import write_meta
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.tokenizer import ByteTokenizer, resolve_tokenizer
from hrm_lm.prepare import pipeline
from hrm_lm.prepare.pipeline import group_ranges
from hrm_lm.prepare.reading import Pair, Problem, find_files, plan_parts, read_piece
from hrm_lm.prepare.recipe import Recipe, sources_of, special_texts
from hrm_lm.prepare.report import by_source, merge_drops
from hrm_lm.prepare.tasks import Job, Settings, find_duplicates, last_kept, survey, write_shard


def pairs(n, start=0):
    return [(f"What is {i} + {i}?", str(2 * i)) for i in range(start, start + n)]


def write(path, some, **more):
    lines = [json.dumps({"prompt": prompt, "response": response} | more) + "\n" for prompt, response in some]
    path.write_text("".join(lines))
    return str(path)


def load(folder):
    splits = load_dataset(DataConfig(dataset=str(folder), max_val_samples=None), ModelConfig(), 0)
    decode = splits.tokenizer.decode
    return tuple([(decode(s.prompt), decode(s.response)) for s in side] for side in (splits.train, splits.val))


def prepare_here(output, recipe, part_bytes=1 << 20, val_fraction=0.2, strict=True):
    """What `prepare` does, without Ray: training pairs, validation pairs and the report by source."""
    settings = Settings(tokenizer="bytes", val_fraction=val_fraction)
    tokenizer, sources = ByteTokenizer(), sources_of(Recipe.model_validate(recipe), settings, Chat())
    files = [
        file._replace(source=i) for i, source in enumerate(sources) for file, _ in find_files(source.inputs, "input")
    ]
    parts, fs = plan_parts(files, part_bytes), pyarrow.fs.LocalFileSystem()
    job = Job(settings, sources, parts, fs, str(output), strict, False)
    (output / ".prepare").mkdir(parents=True)
    surveyed = [survey(job, part) for part in range(len(parts))]
    groups = np.array([result["groups"] for result in surveyed])
    ranges = group_ranges(groups.sum(axis=0))
    duplicates = {first: np.array(find_duplicates(job, (first, last), groups)["parts"]) for first, last in ranges}
    last = {source.name: last_kept(job, i, ranges, groups, duplicates) for i, source in enumerate(sources)}
    write_part = partial(
        write_shard, job, tokenizer_json=tokenizer.to_json(), duplicates=duplicates,
        pairs=groups.sum(axis=1).tolist(), last=last,
    )  # fmt: skip
    written = [write_part(part) for part in range(len(parts))]
    shards = {s: [result["shards"][s] for result in written if s in result["shards"]] for s in ("train", "val")}
    write_meta(fs, str(output), tokenizer, shards)
    return *load(output), by_source(job, groups, duplicates, written)


def read_all(recipe):
    """What the files of a recipe of one source hold."""
    (source,) = sources_of(Recipe.model_validate(recipe), Settings(tokenizer="bytes"), Chat())
    return [item for file, _ in find_files(source.inputs) for item in read_piece(file, source.mapping)]


# --- caps and repetition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [1 << 20, 40])
def test_a_cap_leaves_exactly_so_many_pairs_drawn_from_all_whatever_the_shards(tmp_path, monkeypatch, grouped):
    """A pair that occurs twice counts once, and so does a pair that an earlier source has."""
    monkeypatch.setattr(pipeline, "GROUPED_TOGETHER", grouped)
    some = pairs(400)
    first = write(tmp_path / "a.jsonl", some[:50])
    second = write(tmp_path / "b.jsonl", some + some[:300])
    left = {}
    for cap in (1, 40, 349, 350, 351, None):
        kept = []
        for part_bytes in (1 << 20, 3000, 700):
            recipe = {"sources": {"first": {"input": first}, "second": {"input": second, "cap": cap}}}
            train, val, report = prepare_here(tmp_path / f"{cap}-{part_bytes}", recipe, part_bytes)
            assert report["first"] == {"pairs": 50, "duplicates": 0, "over_cap": 0} | {
                side: report["first"][side] for side in ("train", "val")
            }
            kept.append(set(train + val) - set(some[:50]))
            assert len(kept[-1]) == min(cap or 350, 350) == report["second"]["train"] + report["second"]["val"]
            assert report["second"]["duplicates"] == 350 and report["second"]["over_cap"] == 350 - len(kept[-1])
        assert kept[0] == kept[1] == kept[2]
        left[cap] = kept[0]
    assert left[1] < left[40] < left[349] < left[350] == left[351] == left[None], "a larger cap leaves more of the same"
    numbers = sorted(int(prompt.split()[2]) for prompt, _ in left[40])
    assert numbers[0] < 100 and numbers[-1] > 340, "not the first pairs"


def test_a_repeated_source_is_trained_on_so_often_and_validated_once(tmp_path):
    often, once = pairs(60), pairs(60, 1000)
    recipe = {
        "sources": {
            "often": {"input": write(tmp_path / "a.jsonl", often + often[:30]), "repeat": 3, "cap": 50},
            "once": {"input": write(tmp_path / "b.jsonl", once + often)},
        }
    }
    train, val, report = prepare_here(tmp_path / "out", recipe)
    counts = Counter(train)
    kept = [pair for pair in counts if pair in often]
    assert {counts[pair] for pair in kept} == {3} and {counts[pair] for pair in counts if pair in once} == {1}
    assert len(kept) + sum(pair in often for pair in val) == 50 and max(Counter(val).values()) == 1
    assert report["often"] == {
        "pairs": 90, "duplicates": 30, "over_cap": 10, "train": 3 * len(kept), "val": 50 - len(kept),
    }  # fmt: skip
    assert report["once"]["duplicates"] == 60, "what another source has is not taken for a repetition"


def test_a_file_of_two_sources_has_its_faults_reported_with_their_lines_for_each(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes((tmp_path / write(file, pairs(9))).read_bytes() + b"{broken\n")
    recipe = Recipe.model_validate(
        {"sources": {name: {"input": str(file), "condition": name} for name in ("cot", "synth")}}
    )
    settings = Settings(tokenizer="bytes")
    sources = sources_of(recipe, settings, Chat())
    files = [f._replace(source=i) for i, source in enumerate(sources) for f, _ in find_files(source.inputs)]
    parts = plan_parts(files, 1 << 20)
    assert [[piece.source for piece in part] for part in parts] == [[0], [1]], "a part is of one source"
    job = Job(settings, sources, parts, pyarrow.fs.LocalFileSystem(), str(tmp_path / "out"), False, False)
    (tmp_path / "out/.prepare").mkdir(parents=True)
    surveyed = [survey(job, part) for part in range(2)]
    (drop,) = merge_drops(job, surveyed, surveyed).values()
    assert [example["place"] for example in drop["examples"]] == [f"{file}:10"] * 2


# --- conditions --------------------------------------------------------------------------------------------------


def test_tags_stand_before_the_prompt_in_their_order_and_a_question_is_on_one_side_whatever_its_tags(tmp_path):
    file = write(tmp_path / "a.jsonl", pairs(100))
    recipe = {
        "conditions": {"code": "#code "},
        "sources": {
            "plain": {"input": file},
            "cot": {"input": [file], "condition": "synth,cot"},
            "code": {"input": file, "condition": "code"},
        },
    }
    train, val, report = prepare_here(tmp_path / "out", recipe)
    for start in ("", "<|synth|><|cot|>", "#code "):
        assert {(start + prompt, response) for prompt, response in pairs(100)} <= set(train + val)
    assert len(train + val) == 300 and {counts["duplicates"] for counts in report.values()} == {0}
    question = lambda prompt: prompt[prompt.index("What") :]  # noqa: E731
    assert {question(p) for p, _ in train}.isdisjoint(question(p) for p, _ in val) and val


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_each_record_may_name_its_tags_and_the_published_form_of_a_prompt_is_had(tmp_path, name):
    """The form is that of HRM-Text's own data pipeline: <|im_start|>, the tags, the instruction, <|im_end|>."""
    tags = ["direct", "cot,noisy", "synth, cot", ""] * 5
    lines = [{"instruction": f"q{i}", "response": f"r{i}", "condition": tag} for i, tag in enumerate(tags)]
    file = tmp_path / name
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([line | {"id": 1} for line in lines]), file)
    published = dict(
        direct="<|object_ref_start|>", cot="<|object_ref_end|>", noisy="<|quad_start|>", synth="<|quad_end|>"
    )
    recipe = {
        "conditions": published,
        "prompt_template": "<|im_start|>{condition}{prompt}<|im_end|>",
        "sources": {"all": {"input": str(file), "prompt_field": "instruction", "condition": "{condition}"}},
    }
    train, val, _ = prepare_here(tmp_path / "out", recipe)
    texts = ["<|object_ref_start|>", "<|object_ref_end|><|quad_start|>", "<|quad_end|><|object_ref_end|>", ""] * 5
    assert sorted(train + val) == sorted((f"<|im_start|>{t}q{i}<|im_end|>", f"r{i}") for i, t in enumerate(texts))


def test_a_record_with_an_unknown_tag_or_none_is_left_out_and_reported(tmp_path):
    lines = [{"prompt": "a", "response": "b", "tag": "cot"}, {"prompt": "c", "response": "d", "tag": "cott"}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "e", "response": "f"}])
    )
    (tmp_path / "b.txt").write_text("some words of a text")
    recipe = {"sources": {"all": {"input": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], "condition": "{tag}"}}}
    found = read_all(recipe)
    assert [item.prompt for item in found if isinstance(item, Pair)] == ["<|cot|>a"]
    assert [(item.reason, item.position) for item in found if isinstance(item, Problem)] == [
        ("no such condition", 2), ("no field 'tag'", 3), ("no field 'tag'", 1),
    ]  # fmt: skip


def test_plain_text_and_conversations_get_the_tags_too(tmp_path):
    (tmp_path / "b.txt").write_text("some words of a text")
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd")]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    items = read_all({"sources": {"all": {"input": str(tmp_path), "condition": "direct"}}})
    (text, rest), *talk = [item[:2] for item in items if isinstance(item, Pair)]
    assert text.startswith("<|direct|>some") and text.removeprefix("<|direct|>") + rest == "some words of a text"
    assert talk == [("<|direct|>a", "b"), ("<|direct|>user: a\nassistant: b\nuser: c\nassistant:", "d")]


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_takes_sources_of_every_kind_and_a_trained_tokenizer_has_a_token_for_each_tag(
    cluster, command, tmp_path
):
    datasets = pytest.importorskip("datasets")
    some = pairs(300)
    turns = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}], "id": i}
        for i, (p, r) in enumerate(some)
    ]
    datasets.Dataset.from_list(turns).save_to_disk(tmp_path / "saved")
    recipe = {
        "sources": {
            "sums": {"input": write(tmp_path / "a.jsonl", some), "condition": "direct", "repeat": 2},
            "talk": {"input": f"hf:{tmp_path / 'saved'}", "condition": "synth,cot", "cap": 100},
        }
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--train_tokenizer", "bpe", "--vocab_size", 300, "--val_fraction", 0.2, "--shard_mb", 0.005]
    code, out, err = command(main, "--sources", tmp_path / "recipe.yaml", "--output", tmp_path / "out", *options)
    assert code == 0, err
    tokenizer = resolve_tokenizer(str(tmp_path / "out"))
    assert [len(tokenizer.encode(f"<|{tag}|>")) for tag in ("direct", "synth", "cot")] == [1, 1, 1]
    assert len(tokenizer.encode("<|noisy|>")) > 1, "no source has that tag"
    splits = load_dataset(DataConfig(dataset=str(tmp_path / "out")), ModelConfig(), 0)
    firsts = Counter(tuple(sample.prompt[:2].tolist()) for sample in splits.train)
    both = tuple(tokenizer.encode("<|synth|><|cot|>"))
    report = json.loads((tmp_path / "out/report.json").read_text())["sources"]
    assert firsts[both] == report["talk"]["train"] < 100 == report["talk"]["train"] + report["talk"]["val"]
    assert report["talk"]["over_cap"] == 200 and report["sums"]["train"] == 2 * (300 - report["sums"]["val"])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["recipe"]["sources"]["talk"]["condition"] == "synth,cot"
    assert len(meta["splits"]["train"]["shards"]) > 4
    assert "talk: pairs 300, duplicates 0, over_cap 200" in err


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("sources: {a: {input: a.jsonl, cap: 0}}", "recipe.yaml: sources.a.cap: should be greater than or equal to 1"),
        ("sources: {a: {input: a.jsonl, repeat: 1.5}}", "recipe.yaml: sources.a.repeat: should be a valid integer"),
        ("sources: {a: {input: a.jsonl, conditon: cot}}", "sources.a.conditon: no such field; did you mean condition?"),
        ("sources: {a: {input: []}}", "recipe.yaml: sources.a.input: "),
        ("sources: {a: {cap: 5}}", "recipe.yaml: sources.a.input: Field required"),
        ("sources: {}", "recipe.yaml: sources: "),
        ("{}", "recipe.yaml: sources: Field required"),
        ("- a", "recipe.yaml: must be a mapping"),
        ("sources: {a: {input: a.jsonl, condition: cott}}", "sources.a.condition: no such condition: 'cott'; there are"),
        ("sources: {a: {input: a.jsonl, condition: '{tag'}}", "sources.a.condition '{tag': not a template"),
        ("sources: {a: {input: a.jsonl, prompt_field: '{q'}}", "sources.a.prompt_field '{q': not a template"),
        ("{prompt_template: '{promt}', sources: {a: {input: a.jsonl}}}", "prompt_template '{promt}': has {prompt}, and"),
        ("{prompt_template: '{prompt}', sources: {a: {input: a.jsonl, condition: cot}}}", "has no place for it"),
        ("{conditions: {cot: ''}, sources: {a: {input: a.jsonl}}}", "recipe.yaml: conditions.cot: "),
        ("sources: {a: {input: missing.jsonl}}", "sources.a.input missing.jsonl: does not exist"),
        ("sources: {a: {input: 'hf:x,val_split=y'}}", "sources.a.input hf:x,val_split=y: prepare holds out by itself"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_a_line_with_its_field(command, in_folder, recipe, message):
    write(in_folder / "a.jsonl", pairs(5))
    (in_folder / "recipe.yaml").write_text(recipe)
    code, out, err = command(main, "--sources", "recipe.yaml", "--output", "out", "--tokenizer", "bytes")
    assert code == 2 and message in err and "Traceback" not in err and not out, err
    assert not (in_folder / "out").exists()


@pytest.mark.parametrize("page", ["data.md", "hrm-text.md"])
def test_the_recipes_of_the_docs_are_recipes(page):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    recipes = [yaml.safe_load(block) for block in blocks if "sources:" in block]
    assert recipes
    for recipe in recipes:
        assert special_texts(sources_of(Recipe.model_validate(recipe), Settings(), Chat()))


def test_keys_in_a_recipe_are_in_no_file_of_the_output():
    recipe = Recipe.model_validate({"sources": {"a": {"input": ["s3://KEY:secret@bucket/x", "y"]}}})
    assert "secret" not in json.dumps(pipeline.without_keys(recipe.model_dump()))


def test_a_made_tokenizer_gets_tokens_for_the_tags_of_records_too():
    recipe = {"sources": {"a": {"input": "x", "condition": "{tag}"}, "b": {"input": "x"}}, "conditions": {"code": "#"}}
    sources = sources_of(Recipe.model_validate(recipe), Settings(), Chat())
    assert special_texts(sources) == ["<|direct|>", "<|cot|>", "<|noisy|>", "<|synth|>", "#"]
    assert special_texts(sources[1:]) == []
