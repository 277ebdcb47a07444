import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from distill_nemo.publishing.push import PushError, check_push, push_directory
from distill_nemo.push_config import PushConfig
from tests.hub import PART, TOKEN, Fault, blob

TO = PushConfig(push_to="ORG/student")
CARD = b"---\nlibrary_name: transformers\n---\n# A student\n"
COMMIT = "Upload a distilled student"


@pytest.fixture
def directory(tmp_path):
    """Return an export: weights in one piece and in parts, and small files, one in a folder."""
    target = tmp_path / "student"
    (target / "additional_chat_templates").mkdir(parents=True)
    for name, content in {
        "README.md": CARD,
        "config.json": b"{}",
        "additional_chat_templates/tool.jinja": b"{{ x }}",
        "model-00001-of-00002.safetensors": os.urandom(5000),
        "model-00002-of-00002.safetensors": os.urandom(2 * PART + 777),
    }.items():
        (target / name).write_bytes(content)
    return target


def content(directory):
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


def pushed(hub, repo="ORG/student", branch="main"):
    files = hub.files(repo, branch)
    del files[".gitattributes"]
    return files


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_push_is_one_commit_of_every_file(hub, directory, capsys):
    check_push(TO, directory)
    assert hub.titles("ORG/student") == ["initial commit"]
    commit = push_directory(TO, directory)
    assert pushed(hub) == content(directory)
    assert hub.titles("ORG/student") == ["initial commit", COMMIT]
    assert f"pushed {directory} to {hub.url}/ORG/student/tree/{commit}" in capsys.readouterr().out
    assert not hub.repositories["ORG/student"].private


def test_a_second_push_sends_and_commits_nothing(hub, directory):
    first = push_directory(TO, directory)
    before = hub.sent.total()
    assert push_directory(TO, directory) == first
    assert hub.sent.total() == before == 5000 + 2 * PART + 777


def test_a_private_repository_and_a_branch_are_made_if_asked(hub, directory):
    push_directory(PushConfig(push_to="ORG/student@step_4", push_private=True), directory)
    assert hub.repositories["ORG/student"].private
    assert pushed(hub, branch="step_4") == content(directory)
    assert hub.titles("ORG/student") == ["initial commit"]


def test_nothing_private_goes_to_a_public_repository(hub, directory):
    check_push(TO, directory)
    private = PushConfig(push_to="ORG/student", push_private=True, push_overwrite=True)
    for refusing in (check_push, push_directory):
        with pytest.raises((ValueError, PushError), match="ORG/student is public, and push_private = True; make it"):
            refusing(private, directory)
    assert hub.titles("ORG/student") == ["initial commit"]


def test_a_new_branch_may_replace_what_main_keeps(hub, directory, tmp_path):
    push_directory(TO, directory)
    main, other = pushed(hub), tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"another step")
    on_branch = PushConfig(push_to="ORG/student@step_4")
    check_push(on_branch, other)
    push_directory(on_branch, other)
    assert pushed(hub) == main
    kept = {name: each for name, each in main.items() if not name.endswith(".safetensors")}
    assert pushed(hub, branch="step_4") == kept | content(other)


def test_weights_that_were_pushed_from_here_are_replaced_and_others_are_not(hub, directory):
    push_directory(TO, directory)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    (directory / "model.safetensors").write_bytes(b"another step")
    check_push(TO, directory)
    push_directory(TO, directory)
    assert pushed(hub) == content(directory), "no file of the earlier model is left beside"
    hub.repositories["ORG/student"].commit(
        "main", "by hand", hub.files("ORG/student") | {"model.safetensors": b"other"}
    )
    for refusing in (lambda: check_push(TO, directory), lambda: push_directory(TO, directory)):
        with pytest.raises((ValueError, PushError), match=r"holds files that this output has not pushed: model\.safe"):
            refusing()
    assert hub.files("ORG/student")["model.safetensors"] == b"other"
    over = PushConfig(push_to="ORG/student", push_overwrite=True)
    check_push(over, directory)
    push_directory(over, directory)
    assert pushed(hub) == content(directory)


def test_files_of_others_stay_beside_the_export(hub, directory):
    check_push(TO, directory)
    repository = hub.repositories["ORG/student"]
    repository.commit("main", "by hand", hub.files("ORG/student") | {"figure.png": b"png", "gguf/a.gguf": b"gguf"})
    push_directory(TO, directory)
    assert pushed(hub) == content(directory) | {"figure.png": b"png", "gguf/a.gguf": b"gguf"}


def test_a_token_is_needed_and_must_be_valid_and_may_write(hub, directory, monkeypatch):
    hub.user("hf_reads_only_0000", "ORG", write=False)
    hub.user("hf_of_another_0000", "OTHER")
    check_push(TO, directory)
    for token, message in {
        "": "push_to = ORG/student needs a token: export HF_TOKEN",
        "hf_unknown_000000": "does not accept the token in HF_TOKEN",
        "hf_reads_only_0000": "the token in HF_TOKEN may not write there",
        "hf_of_another_0000": "the token in HF_TOKEN may not write there",
    }.items():
        monkeypatch.setenv("HF_TOKEN", token)
        for repo in ("ORG/student", "ORG/new"):
            with pytest.raises(ValueError, match=message.replace("ORG/student", repo)) as refused:
                check_push(PushConfig(push_to=repo), directory)
            assert not token or token not in str(refused.value)


@pytest.mark.parametrize("token", ["hf_first_000000\nhf_second_00000", "hf_first_000000 # mine", "hf_first_00000\xfc"])
def test_a_token_with_more_beside_it_is_refused_and_not_shown(hub, directory, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=r"^HF_TOKEN holds more than a token") as refused:
        check_push(TO, directory)
    assert token[:8] not in str(refused.value)


def test_a_hub_that_does_not_answer_is_told_at_the_start(hub, directory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match=r"ORG/student on http://127\.0\.0\.1:9: .*leave push_to out, and push later"):
        check_push(TO, directory)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /storage/", 500),
        Fault(f"PUT /storage/{'.' * 64}/2", after=1000),
        Fault("POST /.*/objects/batch", 429),
        Fault("POST /api/.*/commit/", 503, times=2),
        Fault("POST /api/.*/commit/"),
        Fault("POST /api/.*/commit/", lost=True),
        Fault("GET /api/.*/tree/", 500),
        Fault("POST /api/repos/create", 502),
    ],
    ids=lambda fault: f"{fault.request} {fault.status}{' lost' * fault.lost}",
)
def test_a_fault_that_passes_is_sat_out(hub, directory, fault, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub's own waits, too
    hub.faults.append(fault)
    push_directory(TO, directory)
    assert fault.times == 0
    assert pushed(hub) == content(directory)
    assert hub.titles("ORG/student") == ["initial commit", COMMIT]


def test_a_hub_that_falls_silent_is_not_waited_for(hub, directory, monkeypatch):
    monkeypatch.setattr("distill_nemo.hub.SILENCE_SECONDS", 0.3)
    hub.faults.append(Fault("POST /api/.*/commit/", silent=True, times=9))
    with pytest.raises(PushError, match="timed out"):
        push_directory(TO, directory)


def test_a_lasting_fault_ends_the_push_and_says_that_the_export_is_whole(hub, directory):
    hub.faults.append(Fault("POST /api/.*/commit/", 403))
    with pytest.raises(
        PushError, match=r"the push failed, and the export in .* is whole: ORG/student on .* may not wri"
    ):
        push_directory(TO, directory)
    assert hub.titles("ORG/student") == ["initial commit"], "nothing is visible before the commit"
    before = hub.sent.total()
    push_directory(TO, directory)
    assert (pushed(hub), hub.sent.total()) == (content(directory), before)


def pushed_while(hub, directory, files):
    """Push, while another commit adds `files` between the push's first look at the branch and its commit."""
    check_push(TO, directory)
    (path,) = directory.glob("*-00001-*")
    hub.blocked[sha256(path)] = taken = threading.Event()

    def by_hand():
        while not hub.sent[sha256(path)]:
            time.sleep(0.01)
        with hub.lock:
            hub.repositories["ORG/student"].commit("main", "by hand", hub.files("ORG/student") | files)
        taken.set()

    other = threading.Thread(target=by_hand)
    other.start()
    try:
        push_directory(TO, directory)
    finally:
        other.join()


def test_a_commit_in_between_is_kept(hub, directory):
    pushed_while(hub, directory, {"figure.png": b"png"})
    assert pushed(hub) == content(directory) | {"figure.png": b"png"}
    assert hub.titles("ORG/student") == ["initial commit", "by hand", COMMIT]


def test_weights_that_come_in_between_are_not_joined(hub, directory):
    with pytest.raises(PushError, match=r"holds files that this output has not pushed: model\.safetensors"):
        pushed_while(hub, directory, {"model.safetensors": b"other"})
    assert pushed(hub) == {"model.safetensors": b"other"}


def test_a_killed_push_goes_on_and_sends_nothing_twice(hub, directory, tmp_path):
    first, second = sorted(directory.glob("*.safetensors"))
    hub.blocked[sha256(second)] = threading.Event()
    call = "from pathlib import Path; from distill_nemo.publishing.push import *; push_directory(PushConfig(push_to="
    script = f"{call}'ORG/student'), Path('{directory}'))"
    more = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | more)
    while process.poll() is None and not (sha256(first) in hub.stored and hub.sent[sha256(second)] >= PART // 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    hub.blocked.pop(sha256(second)).set()
    assert hub.titles("ORG/student") == ["initial commit"]
    push_directory(TO, directory)
    assert hub.sent[sha256(first)] == first.stat().st_size, "it was stored before the kill"
    assert pushed(hub) == content(directory)
    assert hub.titles("ORG/student") == ["initial commit", COMMIT]


def test_content_that_the_hub_holds_differently_is_no_success(hub, directory, monkeypatch):
    monkeypatch.setattr("tests.hub._Handler.entry", _entry_of_damaged)
    with pytest.raises(PushError, match=r"holds other content than was sent: config\.json"):
        push_directory(TO, directory)


def _entry_of_damaged(self, name, content):
    content = content if isinstance(content, bytes) else self.hub.stored[content]
    changed = content[:-1] + b"?" if name == "config.json" else content
    entry = {"type": "file", "path": name, "size": len(content), "oid": blob(changed)}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
    return entry | ({"lfs": large} if name.endswith(".safetensors") else {})


@pytest.mark.parametrize(
    "push_to",
    [
        *(
            "",
            "student",
            "ORG/student/x",
            "https://huggingface.co/ORG/x",
            "-ORG/a",
            "ORG/a--b",
            "ORG/a..b",
            "ORG/-a",
            "ORG/a.",
        ),
        *(
            "ORG/a.git",
            "ORG/a.lock",
            "ORG/" + "a" * 97,
            "ORG/a@",
            "ORG/a@refs/pr/1",
            "ORG/a@refs/heads/x",
            "ORG/a@x.lock",
        ),
        *("ORG/a@x.lock/y", "ORG/a@a..b", "ORG/a@/x", "ORG/a@x/", "ORG/a@x//y", "ORG/a@.x", "ORG/a@x/.y", "ORG/a@x."),
        *("ORG/a@-x", "ORG/a@HEAD", "ORG/a@" + "0f" * 20),
    ],
)
def test_a_destination_is_a_repository_and_perhaps_a_branch(push_to):
    with pytest.raises(ValueError, match="is not ORG/NAME or ORG/NAME@BRANCH"):
        PushConfig(push_to=push_to).destination()


def test_a_branch_may_have_parts():
    assert PushConfig(push_to="ORG/a_b.c-d@steps/4.5_x").destination() == ("ORG/a_b.c-d", "steps/4.5_x")


def test_a_token_in_a_destination_is_not_repeated():
    with pytest.raises(ValueError, match=r"hf_\*\*\*") as refused:
        PushConfig(push_to=f"https://me:{TOKEN}@huggingface.co/ORG/x").destination()
    assert TOKEN not in str(refused.value)


def test_fields_of_a_push_need_a_push():
    assert PushConfig().destination() is None
    for field in ("push_private", "push_overwrite"):
        with pytest.raises(ValueError, match=f"{field} = True needs push_to"):
            PushConfig(**{field: True}).destination()
