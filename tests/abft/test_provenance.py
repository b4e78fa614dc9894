"""Where results come from: a checkout, or files that were copied without one."""

import pytest

from abft.provenance import installed, provenance


def test_of_this_package():
    found = provenance()
    assert found["command"][0] == "abft"
    assert {"abft", "python", "torch"} <= found["versions"].keys()
    assert "not installed" not in found["versions"].values()


def test_packages_that_are_missing_are_named():
    assert installed(["torch", "no-such-package"])["no-such-package"] == "not installed"


@pytest.mark.parametrize(("value", "dirty"), [("0", False), ("1", True), ("", None)])
def test_files_without_a_checkout_take_the_commit_from_variables(value, dirty, tmp_path, monkeypatch):
    monkeypatch.setenv("OF_COMMIT", "abc")
    monkeypatch.setenv("OF_DIRTY", value)
    found = provenance("run me", ["torch"], folder=tmp_path, variables=("OF_COMMIT", "OF_DIRTY"))
    assert (found["command"], found["commit"], found["dirty"]) == ("run me", "abc", dirty)
    assert set(found["versions"]) == {"python", "torch"}
    found = provenance(folder=tmp_path)
    assert (found["commit"], found["dirty"]) == (None, None)
