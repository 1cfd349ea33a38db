"""Where models are: folders, and repositories of the hub, of which nothing is fetched that is not needed."""

from pathlib import Path

from glm52.hub import name_of


def test_a_repository_is_called_by_its_name_and_not_by_its_commit(tmp_path: Path) -> None:
    """``glm52 serve owner/name`` called its model by forty hexadecimal digits."""
    assert name_of(tmp_path / "models--zai-org--GLM-5.2-FP8" / "snapshots" / "0123abcd") == "GLM-5.2-FP8"
    assert name_of(tmp_path / "mine") == "mine"
