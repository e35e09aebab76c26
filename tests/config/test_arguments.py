"""Which of a command's arguments is its configuration file, and which replace keys of it."""

from pathlib import Path

import pytest

from deca_ds.config.arguments import chosen
from deca_ds.config.load import load_config
from deca_ds.errors import ConfigError
from deca_ds.tools.train_arguments import parser


def of(*arguments):
    return chosen(parser().parse_intermixed_args(arguments))


@pytest.mark.parametrize("named", [["--config", "run.yaml"], ["--config=run.yaml"], ["run.yaml"]])
def test_the_file_stands_anywhere_with_and_without_the_option(named):
    keys = ["optimizer.lr=1e-4", "data.train=[a.yaml]"]
    for order in ([*named, *keys], [keys[0], *named, keys[1]], [*keys, "--dry-run", *named]):
        assert of(*order) == (Path("run.yaml"), keys)
    assert of(*keys) == (None, keys)


def test_what_is_a_file_and_what_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("plain").touch()
    for name in ("plain", "~/plain", "runs/lr=1/config.yaml", "gone.YML"):
        assert of(name) == (Path(name.replace("~", str(tmp_path))), [])
    for key in ("model.path=run.yaml", "optimizer.lr", "1e-4"):
        assert of(key) == (None, [key])


def test_two_files_a_missing_file_and_an_argument_that_is_no_key_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"two configurations: 'a\.yaml' and 'b\.yaml'"):
        of("--config", "a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"no configuration file '.*gone\.yaml'"):
        load_config(*of(str(tmp_path / "gone.yaml")))
    with pytest.raises(ConfigError, match=r"(?s)cannot read the argument .optimizer\.lr.*key=value"):
        load_config(*of("optimizer.lr", "1e-4"))
    with pytest.raises(ConfigError, match=r"(?s)no value for model\.path.*or name the file: RUN\.yaml"):
        load_config(*of())
