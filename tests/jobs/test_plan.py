from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs.plan import lines, make_plan

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "jobs").glob("*.yaml"))
CHOICE = {"kind": "loglikelihood_choice", "choices": "options", "target": "answer"}
EXACT = {"kind": "exact_match", "target": "{{ answer }}"}
GOOD = {"word": "w", "answer": 0, "options": ["a", "b"]}


def plan_fault(job: Path) -> str:
    with pytest.raises(InputError) as fault:
        make_plan(job)
    return str(fault.value)


@pytest.mark.parametrize(
    ("row", "task", "fault"),
    [
        ({"wrd": 1}, {}, "data.jsonl:2: prompt: 'word' is undefined"),
        ('{"word": ', {}, "data.jsonl:2: is not JSON: Input data was truncated"),
        ('{"word": NaN}', {}, "data.jsonl:2: is not JSON: "),
        ('["word"]', {}, "data.jsonl:2: is not a JSON object {...}"),
        (b'{"word": "\xff"}', {}, "data.jsonl:2: is not JSON: "),
        ("[" * 3000 + "]" * 3000, {}, "data.jsonl:2: is not JSON: "),
        ('{"word": 1e999}', {}, "data.jsonl:2: is not JSON: "),
        (GOOD, {"id": "{{ word }}"}, "data.jsonl:2: id: 'w' is the id of line 1 too"),
        (
            GOOD | {"answer": 2},
            {"score": CHOICE},
            "data.jsonl:2: score.target: 2 is not the number",
        ),
        (
            GOOD | {"answer": "0"},
            {"score": CHOICE},
            "data.jsonl:2: score.target: '0' is not the nu",
        ),
        (GOOD | {"answer": True}, {"score": CHOICE}, "data.jsonl:2: score.target: True is not the"),
        (GOOD | {"options": ["a"]}, {"score": CHOICE}, "data.jsonl:2: score.choices: needs a list"),
        (GOOD | {"options": "ab"}, {"score": CHOICE}, "data.jsonl:2: score.choices: needs a list"),
        (GOOD | {"options": ["", "b"]}, {"score": CHOICE}, "data.jsonl:2: score.choices: needs a"),
        ({"word": "w"}, {"score": CHOICE}, "data.jsonl:2: score.choices: 'options' is undefined"),
        ({"word": "w"}, {"score": EXACT}, "data.jsonl:2: score.target: 'answer' is undefined"),
        ({"word": ""}, {"prompt": "{{ word }}"}, "data.jsonl:2: prompt: renders to nothing"),
        (GOOD, {"prompt": "{{ word / 2 }}"}, "data.jsonl:1: prompt: TypeError("),
        (GOOD, {"prompt": "{{ word.__class__ }}"}, "data.jsonl:1: prompt: "),
        (
            {"wrd": 1},
            {"prompt": None, "chat": [{"role": "user", "content": "{{ word }}"}]},
            "data.jsonl:2: chat[0].content: 'word' is undefined",
        ),
    ],
)
def test_bad_lines_are_named(folder, row, task, fault):
    raw = (
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
    )
    (folder.path / "data.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + raw + b"\n")
    assert fault in plan_fault(folder.job(task=task))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"endpoints": []}, "job.yaml:1: endpoints: servers, or the gateway that has them (disco"),
        ({"discover": "http://g"}, "(discover): leave one of the two out"),
        ({"endpoints": [], "discover": "g:3"}, "discover: 'g:3' is not a base URL"),
        ({"endpoints": ["localhost:30000"]}, "job.yaml:1: endpoints: 'localhost:30000' is not a"),
        ({"endpoints": ["http://h/v1"]}, "endpoints: give 'http://h/v1' without /v1"),
        ({"endpoints": ["http://h", "http://h"]}, "endpoints: 'http://h' is given twice"),
        ({"max_in_flight": 0}, "max_in_flight: must be a whole number"),
        ({"max_inflight": 4}, "max_inflight: unknown key"),
        ({"retry": {"attempts": 4}}, "retry.attempts: unknown key"),
        ({"output": None}, "needs the key output, text"),
        (
            {"output": "${NOT_SET_ANYWHERE}/x"},
            "output: environment variable NOT_SET_ANYWHERE is not",
        ),
        ({"output": "${NOT"}, "output: '${NOT' is not a ${VARIABLE}"),
        ({"vars": {"word": "x"}}, "data.jsonl:1: word: is both a field and one of the job's vars"),
        ({"tasks": []}, "tasks: "),
        ({"task": {"data": "no.jsonl"}}, "job.yaml: tasks[0].data: no such file: "),
        ({"task": {"name": "a/b"}}, "tasks[0].name: "),
        ({"task": {"kind": "harness"}}, "tasks[0].kind: must be jsonl, not the text 'harness'"),
        ({"task": {"prompt": None}}, "tasks[0]: prompt: exactly one of prompt and chat"),
        ({"task": {"chat": []}}, "tasks[0]: prompt: exactly one of prompt and chat"),
        ({"task": {"prompt": None, "chat": []}}, "tasks[0]: chat: at least one message"),
        ({"task": {"prompt": "{{ word"}}, "tasks[0]: prompt: line 1 of the template: "),
        ({"task": {"prompt": "{{ word | nope }}"}}, "prompt: line 1 of the template: No filter"),
        ({"task": {"chat_template_kwargs": {"a": 1}}}, "chat_template_kwargs: needs chat"),
        ({"task": {"limit": 0}}, "tasks[0].limit: "),
        ({"task": {"sampling": {"top_p": 0}}}, "tasks[0].sampling.top_p: "),
        ({"task": {"sampling": {"top_k": 0}}}, "tasks[0].sampling: top_k: 0 keeps no token"),
        ({"task": {"sampling": {"max_tokens": 9}}}, "tasks[0].sampling.max_tokens: unknown key"),
        (
            {"task": {"sampling": {"max_new_tokens": 2, "min_new_tokens": 3}}},
            "tasks[0].sampling: min_new_tokens: is larger",
        ),
        (
            {"task": {"sampling": {"json_schema": "{"}}},
            "tasks[0].sampling: json_schema: Input data was truncated",
        ),
        ({"task": {"score": EXACT | {"pattern": "(a"}}}, "tasks[0].score: pattern: "),
        ({"task": {"score": EXACT | {"pattern": "a"}}}, "pattern: needs exactly one group"),
        ({"task": {"score": EXACT | {"ignore": "["}}}, "tasks[0].score: ignore: "),
        (
            {"task": {"score": {"kind": "exact"}}},
            "tasks[0].score.kind: must be exact_match or loglik",
        ),
        ({"task": {"score": {"target": "x"}}}, "tasks[0].score: "),
        ({"task": {"score": CHOICE | {"choices": ["a"]}}}, "choices: at least two are needed"),
        ({"task": {"score": CHOICE | {"choices": "a b"}}}, "choices: the expression: "),
        ({"task": {"score": CHOICE, "sampling": {}}}, "sampling: loglikelihood_choice samples"),
        (
            {
                "task": {
                    "prompt": None,
                    "chat": [{"role": "user", "content": "x"}],
                    "score": CHOICE,
                }
            },
            "score: loglikelihood_choice needs prompt, not chat",
        ),
    ],
)
def test_bad_jobs_are_named(folder, change, fault):
    folder.data([GOOD])
    message = plan_fault(folder.job(**change))
    assert fault in message


BIG = 10**23
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("endpoints", [f"http://{host}"])
            for host in ("x:99999999", "[::1", "x:0", "x:8a", ":80")
        ),
        *(("endpoints", [f"http://{host}"]) for host in ("@", "[zz]:1", "a..b", ".", "a" * 64)),
        ("endpoints", ["http://h\0"]),
        *((key, value) for key in ("deadline_s", "drain_s") for value in (INF, NAN, -1, BIG)),
        *(("request_timeout_s", value) for value in (INF, NAN, 0, 1e300)),
        *(("priority", value) for value in (BIG, -BIG, 2**31)),
        ("max_in_flight", BIG),
        ("model", ""),
        ("output", ""),
        ("max_in_flight", 100_000),
        *(("retry", {key: INF}) for key in ("first_delay_s", "max_delay_s", "server_down_s")),
        ("retry", {"max_attempts": BIG}),
        *(("api_key_env", value) for value in ("", "A=B", "a\0b")),
    ],
)
def test_a_value_that_would_fail_every_line_is_found_first(folder, key, value):
    folder.data([GOOD])
    assert f"{key}" in plan_fault(folder.job(**{key: value}))


@pytest.mark.parametrize(
    "sampling",
    [
        *({key: BIG} for key in ("max_new_tokens", "min_new_tokens", "top_k", "seed")),
        *({"temperature": value} for value in (INF, NAN, -0.1)),
        *({"top_p": value} for value in (NAN, 5e-324, 1.1)),
        *({"repetition_penalty": value} for value in (NAN, 0, 1e-300)),
        *({key: NAN} for key in ("min_p", "frequency_penalty", "presence_penalty")),
        *({"stop": value} for value in ("", ["a", ""], ["a"] * 33)),
        *({"stop_token_ids": [value]} for value in (-1, BIG)),
        *({"regex": value} for value in ("(((", "[a", "a{2,1}", "*", r"\p{L}(", "(" * 5000)),
        *({"json_schema": value} for value in ("3", "[]", '"a"', "{" * 9, "[" * 5000)),
    ],
)
def test_sampling_that_would_fail_every_line_is_found_first(folder, sampling):
    folder.data([GOOD])
    assert next(iter(sampling)) in plan_fault(folder.job(task={"sampling": sampling}))


@pytest.mark.parametrize(
    "regex",
    [
        r"\d+",
        r"\p{L}+[\p{Nd}_]",
        r"(?<year>\d{4})-(?<month>\d\d)",
        r"[a-\x{10ffff}]|[\u{0}-z]",
        r"^a\z|\\z",
        r"a(?i)b",
        "[[:alpha:]]",
        r"[b-\x7f][\x00-z]\Z",
    ],
)
def test_a_regex_of_another_dialect_is_taken(folder, regex):
    folder.data([GOOD])
    (planned,) = make_plan(folder.job(task={"sampling": {"regex": regex}})).tasks
    assert planned.task.sampling.regex == regex


@pytest.mark.parametrize("value", [INF, NAN, BIG])
def test_template_kwargs_are_what_json_can_carry(folder, value):
    folder.data([GOOD])
    chat = [{"role": "user", "content": "x"}]
    task = {"prompt": None, "chat": chat, "chat_template_kwargs": {"budget": value}}
    assert "tasks[0].chat_template_kwargs.budget: " in plan_fault(folder.job(task=task))
    job = folder.job(
        tasks=None, lm_eval={"tasks": ["x"], "model_args": {"chat_template_kwargs": {"b": value}}}
    )
    assert "lm_eval.model_args.chat_template_kwargs.b: " in plan_fault(job)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": BIG},
        {"seed": -1},
        {"seed": [1, 2, -3, 4]},
        {"limit": INF},
        {"samples": {"x": [-1]}},
        {"bootstrap_iters": BIG},
        {"model_args": {"max_length": 1}},
        {"model_args": {"max_gen_toks": BIG}},
        {"model_args": {"custom_prefix_token_id": -1}},
    ],
)
def test_numbers_that_lm_eval_would_fail_on_are_found_first(folder, changes):
    message = plan_fault(folder.job(tasks=None, lm_eval={"tasks": ["x"]} | changes))
    key, value = next(iter(changes.items()))
    assert (next(iter(value)) if key == "model_args" else key) in message


def test_the_reachable_extremes_are_taken(folder):
    folder.data([GOOD])
    job = folder.job(
        endpoints=["http://[::1]:65535/gate/way", "https://user:pw@ü.de:1", "http://a_b"],
        deadline_s=10**9,
        priority=-(2**31) + 1,
        api_key_env="MY_KEY",
        task={"sampling": {"seed": 2**63 - 1, "max_new_tokens": 2**31 - 1, "stop": ["a"] * 32}},
    )
    assert len(make_plan(job).tasks) == 1


def test_a_home_that_nobody_has(folder):
    folder.data([GOOD])
    assert "output: ~nosuchuser/x: " in plan_fault(folder.job(output="~nosuchuser/x"))


def test_data_that_cannot_be_read(folder, words, monkeypatch):
    """At the check, and when the disk has gone by the time the lines are sent."""
    folder.data(words(2))
    (planned,) = make_plan(folder.job()).tasks

    open_ = Path.open

    def broken(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == "data.jsonl":
            raise OSError(5, "Input/output error", str(path))
        return open_(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    assert "data.jsonl: cannot be read: Input/output error" in plan_fault(folder.job())
    with pytest.raises(JobError, match=r"cannot read .*data.jsonl: Input/output error"):
        next(lines(planned))


def test_a_name_that_no_file_can_have(folder):
    assert "cannot be read: File name too long" in plan_fault(folder.job(task={"data": "x" * 999}))


def test_a_folder_is_no_data(folder):
    (folder.path / "rows").mkdir()
    assert "tasks[0].data: is a folder, not a file: " in plan_fault(
        folder.job(task={"data": "rows"})
    )


def test_tasks_that_share_a_file_name_are_refused(folder):
    folder.data([GOOD])
    tasks = [{"name": n, "data": "data.jsonl", "prompt": "x"} for n in ("Same", "same")]
    assert "tasks: 'same' is given twice" in plan_fault(folder.job(tasks=tasks))


def test_up_to_ten_faults_are_reported_together(folder):
    folder.data([{"wrd": i} for i in range(30)])
    message = plan_fault(folder.job())
    assert [f"data.jsonl:{i}: prompt: 'word'" in message for i in range(1, 12)] == [True] * 10 + [
        False
    ]


def test_an_empty_file_is_refused(folder):
    (folder.path / "data.jsonl").write_text("\n\n")
    assert "data.jsonl: has no lines" in plan_fault(folder.job())


def test_blank_lines_and_a_byte_order_mark_are_passed_over(folder):
    (folder.path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"word": "a"}\n\n  \n{"word": "b"}')
    (task,) = make_plan(folder.job()).tasks
    assert [(line.id, line.line, line.prompt) for line in lines(task)] == [
        ("1", 1, "say a"),
        ("4", 4, "say b"),
    ]


def test_templates_see_fields_and_vars(folder):
    folder.data([{"word": "a", "n": 3, "nested": {"deep": [1, 2]}}])
    task = {"prompt": "{{ shots }}{{ word * n }} {{ nested.deep[1] }}\n", "id": "x-{{ n }}"}
    (planned,) = make_plan(folder.job(task=task, vars={"shots": "Q: "})).tasks
    (line,) = lines(planned)
    assert (line.prompt, line.id) == ("Q: aaa 2", "x-3")


def test_choices_may_be_a_list_of_templates(folder):
    folder.data([{"word": "w", "a": "yes", "i": 1}])
    score = CHOICE | {"choices": ["{{ a }}", "no"], "target": "i", "delimiter": ""}
    (planned,) = make_plan(folder.job(task={"score": score})).tasks
    (line,) = lines(planned)
    assert (line.choices, line.target) == (["yes", "no"], 1)


def test_data_edited_after_the_check_ends_the_run(folder, words):
    path = folder.data(words(3))
    (planned,) = make_plan(folder.job()).tasks
    os.utime(path, ns=(0, 0))
    with pytest.raises(JobError, match=r"data.jsonl was changed after the job had read it"):
        next(lines(planned))


def test_paths_take_environment_variables(folder, words, monkeypatch):
    (folder.path / "elsewhere").mkdir()
    folder.data(words(2), "elsewhere/d.jsonl")
    monkeypatch.setenv("JOB_DATA", str(folder.path / "elsewhere"))
    plan = make_plan(folder.job(task={"data": "${JOB_DATA}/d.jsonl"}, output="${JOB_DATA}/out"))
    assert plan.output == folder.path / "elsewhere" / "out"
    assert plan.total == 2


def test_memory_does_not_grow_with_the_prompts(folder):
    folder.data([{"word": "x" * 10_000} for _ in range(1000)])
    job = folder.job()
    tracemalloc.start()
    (planned,) = make_plan(job).tasks
    count = sum(1 for _ in lines(planned))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1000
    assert peak_bytes < 5_000_000  # the prompts are 10 MB


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_job_we_ship_has_good_input(config, monkeypatch, request):
    if "CONSERVE_DATA" in config.read_text():
        monkeypatch.setenv("CONSERVE_DATA", str(request.getfixturevalue("shared_data")))
    plan = make_plan(config)
    rendered = [line for planned in plan.tasks for line in lines(planned)]
    assert len(rendered) == plan.total
    assert plan.tasks or plan.job.lm_eval


def test_our_questions_are_all_different(checkout):
    for name, count in (("questions", 120), ("choices", 40)):
        text = (checkout / "configs" / "jobs" / "data" / f"{name}.jsonl").read_text()
        rows = [json.loads(row) for row in text.splitlines()]
        assert len({row["question"] for row in rows}) == len(rows) == count


def test_gsm8k_and_arc_easy_targets(checkout, shared_data, monkeypatch):
    monkeypatch.setenv("CONSERVE_DATA", str(shared_data))
    (gsm8k,) = make_plan(checkout / "configs" / "jobs" / "gsm8k.yaml").tasks
    first = next(iter(lines(gsm8k)))
    assert len(gsm8k.ids) == 1319
    assert str(first.target).strip() == "18"
    (arc,) = make_plan(checkout / "configs" / "jobs" / "arc_easy.yaml").tasks
    first = next(iter(lines(arc)))
    assert len(arc.ids) == 2376
    assert first.target == 0
    assert first.choices[0] == " Sunlight is the source of energy for nearly all ecosystems."


@pytest.mark.parametrize(
    ("override", "endpoints", "discover"),
    [
        ({"discover": "http://g"}, [], "http://g"),
        ({"endpoints": ["http://b"]}, ["http://b"], None),
        ({}, ["http://a"], None),
    ],
)
def test_a_gateway_given_replaces_the_endpoints_of_the_file(folder, override, endpoints, discover):
    folder.data([GOOD])
    job = make_plan(folder.job(endpoints=["http://a"]), **override).job
    assert (job.endpoints, job.discover) == (endpoints, discover)


def test_endpoints_given_replace_the_gateway_of_the_file(folder):
    folder.data([GOOD])
    path = folder.job(endpoints=[], discover="http://g")
    job = make_plan(path, endpoints=["http://a"]).job
    assert (job.endpoints, job.discover) == (["http://a"], None)
