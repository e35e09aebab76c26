"""Prepared data: found by what they were made of, whole or made again, the same from any number of processes."""

import ast
import contextlib
import errno
import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import datasets
import pytest
from data_samples import flat, make_byte_tokenizer, make_config, write_jsonl
from transformers import CTRLTokenizer

from deca_ds.data import code, load_client_data, rows
from deca_ds.data.cache import Cache
from deca_ds.data.encoding import Encoder
from deca_ds.data.formats import FORMATS
from deca_ds.data.rows import Work
from deca_ds.errors import ConfigError, DataError

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", ROWS)


@pytest.fixture
def encoded(monkeypatch):
    """How many batches have been tokenised."""
    seen, original = [], Encoder.sequences
    monkeypatch.setattr(
        Encoder, "sequences", lambda self, batch: seen.append(len(batch["text"])) or original(self, batch)
    )
    return seen


def entries(folder, kind="tokens"):
    return sorted(folder.glob(f"{kind}-*"))


def values(data):
    parts = (data.train, data.own_evaluation, data.common_evaluation)
    return [None if part is None else part.to_dict() for part in parts], data.summary, data.notes, data.label_names


def test_the_second_time_nothing_is_tokenised(tokenizer, path, folder, encoded):
    config = make_config(train=[path], cache=str(folder), common_holdout=0.2, packing=True)
    first = load_client_data(config, tokenizer, 0)
    made, before = len(encoded), sorted(folder.rglob("*"))
    assert made and values(load_client_data(config, tokenizer, 0)) == values(first)
    assert len(encoded) == made and sorted(folder.rglob("*")) == before
    assert not [path for path in before if path.name.startswith(".")], "neither locks nor half of anything stay"
    assert {Path(file["filename"]).parent for file in first.train.cache_files} == set(entries(folder))


def test_what_counts_is_content_and_settings(tokenizer, path, folder, encoded):
    def load(made=tokenizer, **options):
        before = len(encoded)
        seed = options.pop("seed", 0)
        data = load_client_data(make_config(seed=seed, cache=str(folder), **{"train": [path], **options}), made, 0)
        return data, len(encoded) > before

    load()
    os.utime(path, ns=(1, 1))
    assert not load()[1], "another time is no other content"
    copy = write_jsonl(path.with_name("b.jsonl"), ROWS)
    assert not load(train=[copy])[1] and not load(batch_size=8, micro_batch_size=2)[1]
    assert load(max_length=20)[1] and load(client_holdout=0.5)[1] and load(seed=1)[1] and load(evaluation=[copy])[1]
    assert load(make_byte_tokenizer(bos_token="<s>", eos_token="</s>"))[1]
    assert entries(folder, "examples")
    state = path.stat()
    write_jsonl(path, [{**row, "text": row["text"].replace("text", "TEXT")} for row in ROWS])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    data, anew = load()
    assert path.stat().st_size == state.st_size and anew, "the same size and time are not the same content"
    assert tokenizer.decode(data.train[0]["input_ids"]).startswith("TEXT")


def test_what_other_code_has_made_does_not_count(tokenizer, path, folder, encoded, monkeypatch):
    config = make_config(train=[path], cache=str(folder))
    load_client_data(config, tokenizer, 0)
    monkeypatch.setattr("deca_ds.data.cache.CODE", code.CODE | {"data": "other"})
    made = len(encoded)
    load_client_data(config, tokenizer, 0)
    assert len(encoded) > made and len(entries(folder)) == len(entries(folder, "examples")) == 2
    with pytest.raises(RuntimeError, match="has changed since"):
        rows.begin("other", b"")


def test_every_source_file_of_the_part_counts(tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(Path(code.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert code.CODE["data"] == code.digest_of(copy), "wherever it lies"
    for file in (copy / "words.py", copy / "formats" / "plain.py"):
        before = code.digest_of(copy)
        file.write_text(file.read_text().replace("return", "return ", 1))
        assert code.digest_of(copy) != before


def test_every_library_that_the_part_imports_counts_or_makes_no_tokens():
    found = set()
    for file in Path(code.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
    found -= sys.stdlib_module_names | {"deca_ds"}
    no_tokens = {"accelerate", "torch", "rich", "xxhash"}
    assert {"datasets", "numpy"} <= found and found - no_tokens <= code.CODE.keys()


OWN_FORMAT = """
from deca_ds.data.formats import Format
from deca_ds.data.formats.fields import PAIRS, text_of

def example(row, rules, place, unused):
    return {"prompt": "PROMPT" + text_of(row, "text", place), "answer": row["label"]}

OWN = Format("own", {"text": "t", "label": "l"}, "", (), PAIRS, example, lambda rules: ("text", "label"))
"""


@pytest.mark.parametrize("has_file", [True, False])
def test_a_format_of_ones_own_counts_by_its_code(tokenizer, path, folder, tmp_path, monkeypatch, has_file):
    """Whether it stands in a file, or in a notebook."""
    if not has_file:
        monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)

    def first(prompt):
        name, text = "own_format" if has_file else "__main__", OWN_FORMAT.replace("PROMPT", prompt)
        module = ModuleType(name)
        if has_file:
            module.__file__ = str(tmp_path / "own_format.py")
            Path(module.__file__).write_text(text)
            monkeypatch.setitem(sys.modules, name, module)
        exec(text, vars(module))
        monkeypatch.setitem(FORMATS, "own", module.OWN)
        config = make_config(train=[path], format="own", cache=str(folder))
        return tokenizer.decode(load_client_data(config, tokenizer, 0).train[0]["input_ids"])

    assert first("Q: ").startswith("Q: text") and first("Question: ").startswith("Question: text")
    assert len(entries(folder)) == len(entries(folder, "examples")) == 2
    assert first("Q: ").startswith("Q: text") and len(entries(folder)) == 2


def test_a_tokenizer_in_python_counts_with_all_of_its_files(tmp_path):
    """Two vocabularies that are alike may be split by different rules."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "a@@", "b@@", "c</w>", "ab@@", "bc</w>", "c"])}

    def fingerprint(merge):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merge}\n")
        made = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
        assert getattr(made, "backend_tokenizer", None) is None
        return Encoder(made, max_length=8).fingerprint

    assert fingerprint("a b") != fingerprint("b c</w>") and fingerprint("a b") == fingerprint("a b")


def damage_truncate(entry):
    file = entry / "train.arrow"
    os.truncate(file, file.stat().st_size // 2)


def damage_a_bit(entry):
    content = bytearray((entry / "train.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (entry / "train.arrow").write_bytes(content)


def damage_the_note(entry):
    note = entry / "entry.json"
    note.write_text(note.read_text().replace('"train": 36', '"train": 35'))


def damage_by_removal(entry):
    (entry / "own_evaluation.arrow").unlink()


def damage_all(entry):
    for file in entry.iterdir():
        file.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_a_bit, damage_the_note, damage_by_removal, damage_all], ids=lambda f: f.__name__
)
def test_what_is_damaged_is_made_again(tokenizer, path, folder, capsys, damage):
    config = make_config(train=[path], cache=str(folder))
    whole = values(load_client_data(config, tokenizer, 0))
    (entry,) = entries(folder)
    damage(entry)
    assert values(load_client_data(config, tokenizer, 0)) == whole
    assert capsys.readouterr().err == f"NOTE: the prepared data in {entry} are damaged, and made again\n"
    load_client_data(config, tokenizer, 0)
    assert not capsys.readouterr().err


def test_damaged_examples_are_read_again(tokenizer, path, folder):
    config = make_config(train=[path], cache=str(folder))
    load_client_data(config, tokenizer, 0)
    (entry,) = entries(folder, "examples")
    os.truncate(entry / "examples.arrow", 100)
    changed = make_config(train=[path], cache=str(folder), max_length=400)
    assert load_client_data(changed, tokenizer, 0).summary["examples"] == 36


def test_nothing_stays_of_what_failed(tokenizer, path, folder):
    write_jsonl(path, [*ROWS, {"body": "x"}])
    config = make_config(train=[path], cache=str(folder))
    for _ in range(2):  # told again, not remembered as something that is there
        with pytest.raises(DataError, match="no column 'text'") as error:
            load_client_data(config, tokenizer, 0)
        assert error.value.where == f"{path}, line 41"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("when", ["deca_ds.data.examples.generate_examples", "deca_ds.data.prepare.pack"])
def test_a_file_that_changes_while_it_is_read_is_refused(tokenizer, path, folder, monkeypatch, when):
    """Else the new rows would stand under the name of the old ones."""
    module, name = when.rsplit(".", 1)
    original = getattr(sys.modules[module], name)

    def changing(*arguments, **options):
        write_jsonl(path, [*ROWS, {"text": "new"}])
        return original(*arguments, **options)

    config = make_config(train=[path], cache=str(folder), packing=True, client_holdout=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(when, changing)
        with pytest.raises(DataError, match=r"(?s)has changed while it was read.*a\.jsonl"):
            load_client_data(config, tokenizer, 0)
    assert load_client_data(config, tokenizer, 0).summary["examples"] == len(ROWS) + 1


def test_what_a_killed_process_left_is_removed_when_it_is_old(tokenizer, path, folder):
    old, young = folder / ".tokens-1.making-x", folder / ".tokens-2.making-y"
    for left in (old, young):
        (left / "entry").mkdir(parents=True)
        (left / "entry" / "train.arrow").write_bytes(b"half")
    for file in (*old.rglob("*"), old):
        os.utime(file, (1, 1))
    load_client_data(make_config(train=[path], cache=str(folder)), tokenizer, 0)
    assert not old.exists() and young.exists(), "a young one may be another run's"


def test_without_a_writable_cache_a_run_goes_on_unless_the_configuration_names_the_cache(
    tokenizer, path, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", file / "datasets")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    data = load_client_data(make_config(train=[path]), tokenizer, 0)
    assert len(data.train["input_ids"][:]) == 36, "what is mapped can be read on"
    assert not list((tmp_path / "tmp").iterdir())
    assert "cannot write to" in (told := capsys.readouterr().err) and "data.cache" in told
    with pytest.raises(ConfigError, match=r"(?s)cannot write to.*data\.cache"):
        load_client_data(make_config(train=[path], cache=str(file / "own")), tokenizer, 0)


def test_a_cache_that_can_only_be_read_will_do_for_what_it_has(tokenizer, path, folder, monkeypatch):
    config = make_config(train=[path], cache=str(folder))
    load_client_data(config, tokenizer, 0)

    def refuse(folder, key):
        raise ConfigError(f"cannot write to {str(folder)!r}", where=key)

    monkeypatch.setattr("deca_ds.data.cache.check_writable", refuse)
    assert load_client_data(config, tokenizer, 0).summary["train"] == 36
    with pytest.raises(ConfigError, match="cannot write"):
        load_client_data(make_config(train=[path], cache=str(folder), max_length=9), tokenizer, 0)


def test_a_full_disk_is_told(tokenizer, path, folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rows.pa.ipc, "new_stream", full)
    with pytest.raises(ConfigError, match=r"(?s)cannot prepare data in.*cache.*No space left.*data\.cache"):
        load_client_data(make_config(train=[path], cache=str(folder)), tokenizer, 0)
    assert not list(folder.iterdir())


def test_of_two_runs_that_make_one_entry_at_once_both_get_a_whole_one(folder):
    """Without locks both make the entry, and both get a whole one; with them the second finds that of the first."""

    def make(name):
        def into(place):
            (place / "a.arrow").write_bytes(b"content")
            if name == "outer":
                other = Cache(str(folder))
                other._locked = lambda target: contextlib.nullcontext()
                assert other.entry("kind", 1, make("inner")).about == {"by": "inner"}
            return {"by": name}

        return into

    assert Cache(str(folder)).entry("kind", 1, make("outer")).about == {"by": "inner"}
    assert len(list(folder.iterdir())) == 1


def test_the_second_process_waits_and_ticks(folder):
    """A lock belongs to an open file, so that a thread with one of its own stands for another process."""
    begun, ticked = threading.Event(), threading.Event()

    def make(place):
        (place / "a.arrow").write_bytes(b"content")
        begun.set()
        assert ticked.wait(60), "the other shows that it is at work"
        return {"by": "the first"}

    with ThreadPoolExecutor() as threads:
        first = threads.submit(Cache(str(folder)).entry, "kind", 1, make)
        assert begun.wait(60)
        second = Cache(str(folder), ticked.set).entry("kind", 1, lambda place: {"by": "the second"})
        assert second.about == first.result(60).about == {"by": "the first"}


def shout(batch):
    """What the processes below run; it refuses row 35."""
    if "text 35" in batch["text"]:
        raise DataError("a wrong row", where="line 36", fix="repair it")
    told = Encoder(make_byte_tokenizer(), max_length=9, words={"a": "x", "b": "y"}).fingerprint
    return {"text": [text.upper() for text in batch["text"]], "told": [f"{os.getpid()} {told}"] * len(batch["text"])}


def test_another_process_gives_the_same_in_order_and_the_same_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BATCH", 10)
    dataset = datasets.Dataset.from_list(ROWS).select(range(39, -1, -1)).select(range(39, -1, -1))
    features = datasets.Features({"text": datasets.Value("string"), "told": datasets.Value("string")})
    job = rows.Encoding(dataset, shout, features, False)
    made, errors = [], []
    for processes in (1, 0):  # 1: of one process beside this one
        made.append([])
        source = (
            rows.by_processes(job, [(0, 10), (10, 20), (20, 30), (30, 40)], 1) if processes else rows.encoded(job, 1)
        )
        with pytest.raises(DataError) as error:
            made[-1].extend(source)
        errors.append(error.value)
    texts = [[batch["text"].to_pylist() for batch in of] for of in made]
    assert texts[0] == texts[1] and flat(texts[0]) == [row["text"].upper() for row in ROWS[:30]]
    (there,), (here,) = ({text for batch in of for text in batch["told"].to_pylist()} for of in made)
    assert there.split()[0] != here.split()[0], "another process"
    assert there.split()[1] == here.split()[1], "what names an entry is the same in every process"
    assert len({(str(error), error.what, error.where, error.fix) for error in errors}) == 1


def test_as_many_processes_as_rows_are_worth(tokenizer, path, folder, monkeypatch):
    asked = []

    def beside(job, ranges, processes):
        asked.append(processes)
        yield from (job.batch(*one) for one in ranges[:1])
        raise rows.BrokenProcessPool("killed")

    monkeypatch.setattr(rows, "by_processes", beside)
    config = make_config(train=[path], cache=str(folder), client_holdout=0.0)
    load_client_data(config, tokenizer, 0, work=Work(64))
    assert not asked, "few rows are for this process"
    monkeypatch.setattr(rows, "ROWS_A_PROCESS", 12)
    monkeypatch.setattr(rows, "BATCH", 15)
    config = make_config(train=[path], cache=str(folder), client_holdout=0.0, seed=1)
    data = load_client_data(config, tokenizer, 0, work=Work(64))
    assert asked == [3]
    told = [tokenizer.decode(ids).removesuffix("</s>") for ids in data.train["input_ids"]]
    assert told == [row["text"] for row in ROWS], "what a process that died has not done is done here"


def test_what_no_other_process_can_be_given_is_done_here(monkeypatch, capsys):
    monkeypatch.setattr(rows, "BATCH", 10)
    features = datasets.Features({"text": datasets.Value("string")})
    job = rows.Encoding(datasets.Dataset.from_list(ROWS), lambda batch: {"text": batch["text"]}, features, False)
    assert flat(batch["text"].to_pylist() for batch in rows.encoded(job, 2)) == [row["text"] for row in ROWS]
    assert "this one continues alone" in capsys.readouterr().err
