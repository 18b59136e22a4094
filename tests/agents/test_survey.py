"""The walk over a folder: what is reviewed, what is skipped, and what is said about it."""

import errno
import os
from pathlib import Path

import pytest

from weft_agents.library.review.survey import MAX_BYTES, SourceFile, Survey, batches, printable, survey
from weft_protocols.errors import UsageError

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and modes")


def write(root: Path, *paths: str, text: str = "x = 1\n") -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


def paths_of(found: Survey) -> list[str]:
    return [file.path for file in found.files]


def reasons_of(found: Survey) -> dict[str, str]:
    return {skipped.path: skipped.reason for skipped in found.skipped}


def test_python_files_are_listed_in_order_with_their_sizes(tmp_path: Path) -> None:
    write(tmp_path, "b.py", "a/z.py", "a/b/c.pyw")
    write(tmp_path, "README.md", "a/data.json")
    found = survey(tmp_path)
    assert found.files == (SourceFile("a/b/c.pyw", 6), SourceFile("a/z.py", 6), SourceFile("b.py", 6))
    assert (found.others, found.folders, found.skipped) == (2, 3, ())
    assert found.root == str(tmp_path)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        (".git", "hidden"),
        (".venv", "hidden"),
        ("node_modules", "vendored"),
        ("lib/site-packages", "vendored"),
        ("pkg/_vendor", "vendored"),
        ("build", "generated"),
        ("dist", "generated"),
    ],
)
def test_folders_of_tools_and_dependencies_are_not_walked(tmp_path: Path, folder: str, reason: str) -> None:
    write(tmp_path, "own.py", f"{folder}/deep/other.py")
    found = survey(tmp_path)
    assert paths_of(found) == ["own.py"]
    assert reasons_of(found) == {f"{folder}/": reason}


def test_a_virtual_environment_is_known_by_its_marker(tmp_path: Path) -> None:
    write(tmp_path, "own.py", "env/pyvenv.cfg", "env/lib/other.py")
    assert reasons_of(survey(tmp_path)) == {"env/": "a virtual environment"}


def test_caches_are_left_out_without_a_word(tmp_path: Path) -> None:
    write(tmp_path, "own.py", "__pycache__/own.py", "weft.egg-info/x.py")
    found = survey(tmp_path)
    assert (paths_of(found), found.skipped) == (["own.py"], ())


def test_a_package_that_is_called_build_is_code(tmp_path: Path) -> None:
    write(tmp_path, "src/build/__init__.py", "src/build/core.py")
    assert paths_of(survey(tmp_path)) == ["src/build/__init__.py", "src/build/core.py"]


def test_a_hidden_folder_is_walked_when_it_is_the_one_named(tmp_path: Path) -> None:
    write(tmp_path, ".tools/run.py")
    assert paths_of(survey(tmp_path / ".tools")) == ["run.py"]


def test_an_empty_folder_has_no_files(tmp_path: Path) -> None:
    found = survey(tmp_path)
    assert (found.files, found.skipped, found.others) == ((), (), 0)


def test_a_single_file_can_be_reviewed(tmp_path: Path) -> None:
    write(tmp_path, "one.py", "two.py")
    found = survey(tmp_path / "one.py")
    assert (found.root, paths_of(found)) == (str(tmp_path), ["one.py"])


def test_a_missing_path_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: there is no such file or folder; name a folder or a \.py"):
        survey(tmp_path / "nowhere")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "notes.txt")
    with pytest.raises(UsageError, match=r"notes\.txt is not a Python file"):
        survey(tmp_path / "notes.txt")


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "one.py")
    with pytest.raises(UsageError, match="not a directory"):
        survey(tmp_path / "one.py" / "deeper")


def test_a_binary_file_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, "own.py")
    (tmp_path / "blob.py").write_bytes(b"\x7fELF\x02\0\0\0")
    found = survey(tmp_path)
    assert (paths_of(found), reasons_of(found)) == (["own.py"], {"blob.py": "binary"})


def test_a_binary_file_that_is_named_alone_leaves_nothing_to_review(tmp_path: Path) -> None:
    (tmp_path / "blob.py").write_bytes(b"\0" * 10)
    found = survey(tmp_path / "blob.py")
    assert (found.files, reasons_of(found)) == ((), {"blob.py": "binary"})


def test_a_huge_file_is_skipped_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "huge.py").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "large.py").write_bytes(b"#" * MAX_BYTES)
    found = survey(tmp_path)
    assert paths_of(found) == ["large.py"]
    assert reasons_of(found) == {"huge.py": "1.0 MB, more than a review reads"}


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    write(tmp_path, "__init__.py", text="")
    assert survey(tmp_path).files == (SourceFile("__init__.py", 0),)


@needs_posix
def test_links_are_not_followed_so_that_loops_and_doubles_are_harmless(tmp_path: Path) -> None:
    write(tmp_path, "own.py", "sub/deep.py")
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.py").symlink_to(tmp_path / "self.py")
    (tmp_path / "twin.py").symlink_to(tmp_path / "own.py")
    (tmp_path / "gone.py").symlink_to(tmp_path / "missing.py")
    found = survey(tmp_path)
    assert paths_of(found) == ["own.py", "sub/deep.py"]
    assert set(reasons_of(found)) == {"sub/up/", "self.py", "twin.py", "gone.py"}
    assert set(reasons_of(found).values()) == {"a link"}


@needs_posix
def test_a_link_to_the_folder_itself_is_resolved(tmp_path: Path) -> None:
    write(tmp_path, "real/own.py")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert survey(tmp_path / "link").root == str(tmp_path / "real")


@needs_posix
def test_a_path_that_is_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="cannot review"):
        survey(tmp_path / "loop")


@needs_posix
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    assert reasons_of(survey(tmp_path)) == {"pipe.py": "not a regular file"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, "own.py", "secret.py", "locked/in.py")
    (tmp_path / "secret.py").chmod(0)
    (tmp_path / "locked").chmod(0)
    try:
        assert reasons_of(survey(tmp_path)) == {
            "secret.py": "permission denied",
            "locked/": "permission denied",
        }
    finally:
        (tmp_path / "locked").chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "own.py", "locked/in.py")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    found = survey(tmp_path)
    assert (paths_of(found), reasons_of(found)) == (["own.py"], {"locked/": "permission denied"})


@needs_posix
@pytest.mark.parametrize("name", [b"caf\xe9.py", b"two\nlines.py"])
def test_a_name_that_cannot_be_printed_is_skipped(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    try:
        Path(os.fsdecode(path)).write_bytes(b"x = 1\n")
    except OSError:
        pytest.skip("this file system takes no such name")
    found = survey(tmp_path)
    assert found.files == ()
    [(shown, reason)] = reasons_of(found).items()
    assert reason == "its name cannot be printed"
    assert shown.isprintable()
    shown.encode("utf-8")


def test_a_name_in_another_script_is_an_ordinary_name(tmp_path: Path) -> None:
    write(tmp_path, "модуль.py")
    assert paths_of(survey(tmp_path)) == ["модуль.py"]


def test_too_many_files_are_cut_off_with_a_word_about_it(tmp_path: Path) -> None:
    write(tmp_path, *(f"m{i}.py" for i in range(5)))
    found = survey(tmp_path, max_files=3)
    assert paths_of(found) == ["m0.py", "m1.py", "m2.py"]
    assert reasons_of(found) == {"m3.py …": "2 files beyond the first 3: name a subfolder to review them"}


def test_a_survey_survives_json(tmp_path: Path) -> None:
    write(tmp_path, "own.py", ".git/x.py", "notes.txt")
    found = survey(tmp_path)
    assert Survey.from_json(found.to_json()) == found


def test_few_files_are_one_task_each() -> None:
    files = [SourceFile(f"m{i}.py", i) for i in range(4)]
    assert batches(files, most=4) == [["m0.py"], ["m1.py"], ["m2.py"], ["m3.py"]]


def test_many_files_are_grouped_by_size_and_each_is_in_one_group() -> None:
    files = [SourceFile(f"m{i:03}.py", (i * 7919) % 20_000) for i in range(500)]
    groups = batches(files, most=60)
    assert len(groups) == 60
    assert sorted(path for group in groups for path in group) == [file.path for file in files]
    sizes = {file.path: file.size for file in files}
    weights = [sum(sizes[path] for path in group) for group in groups]
    assert max(weights) < 1.3 * min(weights)


def test_no_files_are_no_tasks() -> None:
    assert batches([]) == []


def test_printable_text_is_left_alone() -> None:
    assert printable(Path("/home/café/x.py")) == "/home/café/x.py"
