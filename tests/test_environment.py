"""`undertow doctor`: extras by the package's own metadata, and what does not fit."""

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from undertow import environment
from undertow.cli import app
from undertow.installing import install_command

NOT_FOR_USERS = {"bench", "dev"}


def test_every_extra_that_a_user_may_want_has_a_purpose():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(environment.PURPOSES) == set(project["optional-dependencies"]) - NOT_FOR_USERS


def test_all_extras_are_whole_where_the_tests_run():
    assert [extra.missing for extra in environment.extras()] == [()] * len(environment.PURPOSES)


def test_a_package_that_is_missing_or_too_old_is_named_with_the_remedy(monkeypatch):
    real = metadata.version
    versions = {"pyarrow": "16.1", "sympy": None}

    def version(name):
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    missing = {extra.name: (extra.missing, extra.remedy) for extra in environment.extras() if extra.missing}
    wanted = {Requirement(line).name: line.partition(";")[0].strip() for line in metadata.requires("undertow")}
    assert missing == {
        "record": ((wanted["pyarrow"],), install_command("record")),
        "demo": ((wanted["pyarrow"],), install_command("demo")),
        "derive": ((wanted["sympy"],), install_command("derive")),
    }


@pytest.mark.parametrize(
    ("there", "backend", "said"),
    [
        ((), "tensorflow", ["neither PyTorch, Keras nor JAX is here"]),
        (("torch",), "jax", []),
        (("keras", "tensorflow"), "tensorflow", []),
        (("keras", "tensorflow"), "jax", ["Keras is here without JAX"]),
        (("keras", "jax"), "jax", []),
        (("jax",), "tensorflow", []),
        (("keras", "tensorflow"), "openvino", ["Keras is to run on openvino"]),
        (("torch", "keras"), "torch", []),
        (("torch", "keras"), "tensorflow", ["Keras is here without TensorFlow"]),
    ],
)
def test_what_does_not_fit_is_said(monkeypatch, there, backend, said):
    monkeypatch.setattr(environment, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setenv("KERAS_BACKEND", backend)
    found = list(environment.misfits())
    assert len(found) == len(said)
    assert all(sentence.startswith(start) for sentence, start in zip(found, said, strict=True))


def test_the_command_prints_it_and_its_exit_code_tells(monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    done = CliRunner().invoke(app, ["doctor", "--json"], standalone_mode=False)
    found = json.loads(done.stdout)
    assert done.return_value == 0
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["offline"] >= 1
    table = CliRunner().invoke(app, ["doctor"], standalone_mode=False).stdout
    assert all(name in table for name in environment.PURPOSES)
    monkeypatch.setenv("KERAS_BACKEND", "openvino")
    done = CliRunner().invoke(app, ["doctor"], standalone_mode=False)
    assert done.return_value == 2
    assert "does not fit: Keras is to run on openvino" in done.stdout
