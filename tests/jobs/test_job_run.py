from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from conserve_sgl import cli
from conserve_sgl.client.progress import DONE, INTERRUPTED, SOME_FAILED
from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs import run_job
from support.screen import Screen

RUN = """
import sys
from pathlib import Path
from rich.console import Console
from conserve_sgl.jobs import run_job
sys.exit(run_job(Path(sys.argv[1]), console=Console()))
"""


@pytest.fixture
def start(checkout: Path):
    """Starts a run of a job in a process of its own."""
    processes = []

    def start(job: Path) -> subprocess.Popen[str]:
        env = os.environ | {"PYTHONPATH": str(checkout / "python")}
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(job)], env=env, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_every_line_is_answered_once_and_on_disk(server, folder, words, console):
    folder.data(words(50))
    job = folder.job(endpoints=[server.url], max_in_flight=8)

    assert run_job(job, console=console) == DONE

    records = folder.records()
    assert sorted(r["line"] for r in records) == list(range(1, 51))
    assert all(r["output"] == f"W{r['line']}" and r["id"] == str(r["line"]) for r in records)
    assert set(server.prompts.values()) == {1}
    summary = folder.summary()
    assert (summary["partial"], summary["model"], summary["run_lines"]) == (False, "tiny", 50)
    assert summary["tasks"]["words"]["finished"] == 50
    assert summary["run_prompt_tokens"] == sum(r["prompt_tokens"] for r in records)


def test_every_request_says_that_it_is_offline(server, folder, words, console):
    folder.data(words(3))
    run_job(folder.job(endpoints=[server.url]), console=console)
    assert len(server.requests) == 3
    for path, headers, body in server.requests:
        assert path == "/generate"
        assert headers["x-sgl-conserve-class"] == "offline"
        assert "priority" not in body


def test_as_many_in_flight_as_allowed_and_no_more(server, folder, words, start):
    folder.data(words(20))
    server.hold.clear()
    process = start(folder.job(endpoints=[server.url], max_in_flight=3))
    server.wait_until(lambda s: len(s.requests) == 3)
    server.hold.set()
    assert process.wait(timeout=60) == DONE
    assert server.peak == 3


def test_failed_lines_are_reported_and_tried_once_more_by_the_next_run(
    server, folder, words, console
):
    folder.data(words(5))
    server.script["say w2"] = [(400, {}), (400, {})]
    job = folder.job(endpoints=[server.url])

    assert run_job(job, console=console) == SOME_FAILED
    assert [(f["id"], f["status"], f["error"]) for f in folder.failures()] == [
        ("2", 400, "scripted")
    ]
    assert folder.summary()["tasks"]["words"]["failed"] == 1
    assert run_job(job, console=console) == SOME_FAILED
    assert len(folder.failures()) == 1

    assert run_job(job, console=console) == DONE
    assert not (folder.output / "words.errors.jsonl").exists()
    assert sorted(r["line"] for r in folder.records()) == [1, 2, 3, 4, 5]
    assert set(server.prompts.values()) == {1}


def test_many_failures_in_a_row_end_the_job(server, folder, words, console):
    folder.data(words(50))
    server.always = (400, {})
    job = folder.job(endpoints=[server.url], retry={"max_failures_in_a_row": 7}, max_in_flight=1)
    with pytest.raises(JobError, match=r"7 lines failed in a row.*data.jsonl:7: scripted"):
        run_job(job, console=console)
    assert len(server.requests) == 7
    assert folder.summary()["partial"] is True


def test_a_killed_run_goes_on_without_repeating_or_losing_a_line(
    server, folder, words, console, start
):
    folder.data(words(200))
    job = folder.job(endpoints=[server.url], max_in_flight=4)
    process = start(job)
    server.wait_until(lambda s: sum(s.prompts.values()) >= 60)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    kept = {f"say w{r['line']}" for r in folder.records()}
    server.prompts.clear()

    assert run_job(job, console=console) == DONE

    assert sorted(r["line"] for r in folder.records()) == list(range(1, 201))
    assert len(kept) >= 60 - 4
    assert kept.isdisjoint(server.prompts)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_what_is_in_flight_finish(server, folder, words, console, start, sig):
    folder.data(words(100))
    server.hold.clear()
    job = folder.job(endpoints=[server.url], max_in_flight=4, drain_s=60)
    process = start(job)
    server.wait_until(lambda s: len(s.requests) == 4)
    process.send_signal(sig)
    for text in process.stdout:
        if "stopping: 60 s for what is in flight" in text:
            break
    server.hold.set()

    assert process.wait(timeout=60) == INTERRUPTED
    assert sorted(r["line"] for r in folder.records()) == [1, 2, 3, 4]
    assert folder.summary()["partial"] is True

    assert run_job(job, console=console) == DONE
    assert sorted(r["line"] for r in folder.records()) == list(range(1, 101))
    assert set(server.prompts.values()) == {1}


def test_a_second_interrupt_does_not_wait(server, folder, words, start):
    folder.data(words(10))
    server.hold.clear()
    process = start(folder.job(endpoints=[server.url], max_in_flight=2, drain_s=3600))
    server.wait_until(lambda s: len(s.requests) == 2)
    process.send_signal(signal.SIGINT)
    for text in process.stdout:
        if "stopping:" in text:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == INTERRUPTED
    assert folder.records() == []
    assert folder.summary()["partial"] is True


def test_an_interrupt_ends_the_wait_for_a_busy_server(server, folder, words, start):
    folder.data(words(10))
    server.always = (429, {"Retry-After": "3600"})
    process = start(folder.job(endpoints=[server.url], drain_s=3600))
    # Those that were not on their way at the first refusal are not sent at all.
    server.wait_until(lambda s: len(s.requests) >= 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == INTERRUPTED


def test_two_runs_never_write_the_same_folder(server, folder, words, console, start):
    folder.data(words(10))
    server.hold.clear()
    job = folder.job(endpoints=[server.url])
    process = start(job)
    server.wait_until(lambda s: len(s.requests) == 10)
    with pytest.raises(JobError, match=rf"another run \(process {process.pid}\) is writing to"):
        run_job(job, console=console)
    server.hold.set()
    assert process.wait(timeout=60) == DONE
    assert len(folder.records()) == 10


def test_finished_work_needs_no_server(server, folder, words, console):
    folder.data(words(4))
    job = folder.job(endpoints=[server.url])
    run_job(job, console=console)
    server.stop()
    assert run_job(job, console=console) == DONE
    assert folder.summary()["tasks"]["words"]["finished"] == 4
    server.restart()


def test_a_run_on_a_few_lines_goes_on_with_all_of_them(server, folder, words, console):
    folder.data(words(30))
    job = folder.job(endpoints=[server.url])
    assert run_job(job, console=console, limit=10) == DONE
    assert len(folder.records()) == 10
    assert run_job(job, console=console) == DONE
    assert len(folder.records()) == 30
    assert set(server.prompts.values()) == {1}
    assert run_job(job, console=console, limit=5) == DONE
    assert folder.summary()["tasks"]["words"]["finished"] == 5


def test_overrides_replace_what_the_file_says(server, folder, words, console):
    folder.data(words(3))
    other = folder.path / "other"
    job = folder.job()
    assert run_job(job, console=console, endpoints=[server.url], output=other) == DONE
    assert (other / "words.jsonl").is_file()
    assert not folder.output.exists()
    with pytest.raises(InputError, match="with the options given: endpoints: 'nowhere'"):
        run_job(job, console=console, endpoints=["nowhere"])


def test_results_of_another_model_are_not_mixed(server, folder, words, console):
    folder.data(words(6))
    job = folder.job(endpoints=[server.url])
    run_job(job, console=console, limit=3)
    server.model = "other"
    with pytest.raises(JobError, match=r"results of the model tiny, and the endpoints serve other"):
        run_job(job, console=console)
    assert len(folder.records()) == 3
    assert run_job(job, console=console, fresh=True) == DONE
    assert len(folder.records()) == 6


def test_a_key_is_sent_and_a_wrong_one_ends_the_job(server, folder, words, console, monkeypatch):
    folder.data(words(2))
    server.api_key = "secret"
    job = folder.job(endpoints=[server.url], api_key_env="JOB_KEY")
    with pytest.raises(InputError, match="api_key_env: environment variable JOB_KEY is not set"):
        run_job(job, console=console)
    monkeypatch.setenv("JOB_KEY", "wrong")
    with pytest.raises(JobError, match=r"401 Unauthorized: it wants another API key"):
        run_job(job, console=console)
    monkeypatch.setenv("JOB_KEY", "secret")
    assert run_job(job, console=console) == DONE
    assert "secret" not in (folder.output / "job.json").read_text()


def test_an_exact_match_task_is_scored(server, folder, console):
    folder.data([{"q": "ab", "a": "AB"}, {"q": "cd", "a": "no"}, {"q": "ef", "a": "EF"}])
    score = {"kind": "exact_match", "target": "{{ a }}"}
    task = {"prompt": "x {{ q }}", "score": score}
    assert run_job(folder.job(endpoints=[server.url], task=task), console=console) == DONE
    scores = {r["line"]: (r["score"], r["extracted"], r["target"]) for r in folder.records()}
    assert scores == {1: (1.0, "AB", "AB"), 2: (0.0, "CD", "no"), 3: (1.0, "EF", "EF")}
    assert folder.summary()["tasks"]["words"]["score"] == pytest.approx(2 / 3)
    assert "0.667 ± 0.272" in console.file.getvalue()


def test_chat_goes_out_as_flex(server, folder, words, console):
    folder.data(words(1))
    task = {
        "prompt": None,
        "chat": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "{{word}}"},
        ],
        "sampling": {"max_new_tokens": 5, "seed": 3, "min_new_tokens": 1},
    }
    job = folder.job(endpoints=[server.url], task=task, model="m", save_prompts=True)
    assert run_job(job, console=console) == DONE
    ((path, headers, body),) = server.requests
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "w1"}]
    assert path == "/v1/chat/completions"
    assert headers["x-sgl-conserve-class"] == "offline"
    assert body == {
        "model": "m",
        "messages": messages,
        "service_tier": "flex",
        "max_completion_tokens": 5,
        "min_tokens": 1,
        "temperature": 0.0,
        "seed": 3,
    }
    assert folder.records()[0]["prompt"] == messages


def test_a_choice_task_scores_all_choices_from_the_last_shared_token(server, folder, console):
    server.merges = ("o t", "cat")
    folder.data([{"q": "go", "options": ["the cat", "a"], "answer": 1}])
    score = {
        "kind": "loglikelihood_choice",
        "choices": "options",
        "target": "answer",
        "normalise": "bytes",
    }
    job = folder.job(endpoints=[server.url], task={"prompt": "{{ q }}", "score": score})
    assert run_job(job, console=console) == DONE

    # "go" + " the cat" merges the o into the choice, so only "g" is shared: o counts in both.
    _, first, rest = (body for _, _, body in server.requests)
    assert first["logprob_start_len"] == rest["logprob_start_len"] == 0
    assert first["sampling_params"]["max_new_tokens"] == 0
    assert first["input_ids"] == [server.tokens("go the cat")]
    assert rest["input_ids"] == [server.tokens("go a")]
    (record,) = folder.records()
    # "go the cat": o t, h, e, " ", cat once each; "go a": o, " ", a once each.
    assert record["choices"] == [
        {"logprob": pytest.approx(-0.5), "tokens": 5},
        {"logprob": pytest.approx(-0.3), "tokens": 3},
    ]
    # Per byte "the cat" (7) is the likelier one: -0.071 against -0.3.
    assert (record["chosen"], record["output"], record["score"]) == (0, "the cat", 0.0)


def test_a_choice_that_the_tokenizer_drops_is_not_the_likeliest(server, folder, console):
    server.dropped = "\u2764 "
    folder.data([{"q": "go", "options": ["a", "\u2764"], "answer": 1}])
    score = {"kind": "loglikelihood_choice", "choices": "options", "target": "answer"}
    job = folder.job(endpoints=[server.url], task={"prompt": "{{ q }}", "score": score})
    assert run_job(job, console=console) == SOME_FAILED
    (failure,) = folder.failures()
    assert failure["error"] == "the choice ' \u2764' adds no token to the prompt"
    assert folder.records() == []


@pytest.mark.parametrize(
    ("context", "code"), [(128, None), (129, DONE), ("a lot", DONE), (None, DONE)]
)
def test_an_answer_as_long_as_the_context_is_refused(server, folder, words, console, context, code):
    folder.data(words(9))
    server.models_status, server.max_model_len = 200, context
    job = folder.job(endpoints=[server.url])
    if code is None:
        said = "words: max_new_tokens 128 leaves no token for a prompt in .* of 128. Nothing was"
        with pytest.raises(JobError, match=said):
            run_job(job, console=console)
        assert server.requests == []
    else:
        assert run_job(job, console=console) == code


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_gateway_that_shows_no_models_is_fine(server, folder, words, console, status):
    folder.data(words(3))
    server.models_status = status
    assert run_job(folder.job(endpoints=[server.url]), console=console) == DONE


def test_plain_lines_say_how_it_goes(server, folder, words, console):
    folder.data(words(3))
    run_job(folder.job(endpoints=[server.url], name="try"), console=console, limit=1)
    run_job(folder.job(endpoints=[server.url], name="try"), console=console)
    printed = console.file.getvalue()
    assert "try: 1 of 3 lines are done already" in printed
    assert "1/3 done | 0 in 0 out tok/s | ETA - | 0 failed" in printed
    assert "this run: 2 lines in" in printed


def test_bad_input_sends_nothing(server, folder, words, console):
    rows = words(20)
    rows[16] = {"wrod": "w17"}
    folder.data(rows)
    with pytest.raises(InputError, match=r"data.jsonl:17: prompt: 'word' is undefined"):
        run_job(folder.job(endpoints=[server.url]), console=console)
    assert server.requests == []
    assert not folder.output.exists()


# ------------------------------------------------------------- what one line can and cannot do


def test_a_line_of_its_own_404_does_not_end_the_job(server, folder, words, console):
    folder.data(words(5))
    server.script["say w2"] = [(404, {})]
    assert run_job(folder.job(endpoints=[server.url]), console=console) == SOME_FAILED
    assert sorted(r["line"] for r in folder.records()) == [1, 3, 4, 5]
    assert [f["status"] for f in folder.failures()] == [404]


def test_a_server_without_the_path_ends_the_job_at_once(server, folder, words, console):
    folder.data(words(50))
    job = folder.job(endpoints=[f"{server.url}/gateway"], max_in_flight=1)
    with pytest.raises(JobError, match="has no /generate: 404"):
        run_job(job, console=console)
    assert len(folder.failures()) == 1


def test_what_is_in_flight_when_the_job_has_to_end_is_kept(server, folder, words, console):
    """Five lines are held at the server when a sixth one shows that the key is wrong."""
    folder.data(words(9))
    server.script["say w6"] = [(401, {})]
    server.hold.clear()
    job = folder.job(endpoints=[server.url], max_in_flight=6)
    screen = Screen("Waiting for what is in flight")
    with ThreadPoolExecutor(1) as pool:
        released = pool.submit(lambda: screen.seen.wait(60) and server.hold.set())
        with pytest.raises(JobError, match="401"):
            run_job(job, console=Console(file=screen, width=300))
        assert released.done()
    assert sorted(r["line"] for r in folder.records()) == [1, 2, 3, 4, 5]
    assert folder.summary()["run_lines"] == 5
    assert run_job(job, console=console) == DONE
    assert set(server.prompts.values()) == {1}


def test_it_says_why_lines_failed(server, folder, words, console):
    folder.data(words(9))
    for line in (2, 3, 5):
        server.script[f"say w{line}"] = [(400, {})]
    server.script["say w7"] = [(413, {})]
    run_job(folder.job(endpoints=[server.url], max_in_flight=1), console=console)
    said = console.file.getvalue().replace("\n", "")
    data = folder.path / "data.jsonl"
    assert f"failed: 3 x 400 scripted ({data}:2)" in said
    assert f"failed: 1 x 413 scripted ({data}:7)" in said


# ---------------------------------------------------------------------------------- the key


@pytest.mark.parametrize(
    ("named", "option", "environment", "code"),
    [
        ({}, [], {}, 1),
        ({}, ["--api-key=secret"], {}, DONE),
        ({}, [], {"CONSERVE_API_KEY": "secret"}, DONE),
        ({"api_key_env": "KEY"}, [], {"KEY": "secret", "CONSERVE_API_KEY": "other"}, DONE),
        ({"api_key_env": "KEY"}, ["--api-key=secret"], {"KEY": "other"}, DONE),
        ({"api_key_env": "KEY"}, [], {"KEY": "other", "CONSERVE_API_KEY": "secret"}, 1),
        ({"api_key_env": "KEY"}, [], {"KEY": "a\nb"}, 2),
        ({"api_key_env": "KEY"}, [], {}, 2),
    ],
)
def test_the_key_is_the_options_the_jobs_or_the_environments(
    server, folder, words, monkeypatch, named, option, environment, code
):
    server.api_key = "secret"
    folder.data(words(2))
    for name in ("KEY", "CONSERVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    job = str(folder.job(endpoints=[server.url], **named))
    monkeypatch.setattr(sys, "argv", ["conserve", "eval", job, *option])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code
