"""lm-eval tasks against a stand-in for a server: what is sent, read, kept and written."""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from conserve_sgl.client.http import BadReply
from conserve_sgl.client.progress import DONE, INTERRUPTED
from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs import run_job
from conserve_sgl.jobs.ask import read_text
from conserve_sgl.jobs.lm_eval.evaluate import load_tasks
from conserve_sgl.jobs.plan import make_plan
from support.screen import Screen

# What lm-eval imports warns when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__")

CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{answer}}",
}
ANSWERS = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{count}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 7},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = {
    "task": "texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
ROWS = [
    {
        "question": f"what is {word}?",
        "options": ["xyz", "eee"],
        "answer": 0,
        "count": len(f"Q: what is {word}?\nA:"),
    }
    for word in ("up", "down", "sideways", "here", "there")
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    from support.tiny_models import make_tiny_model  # imports transformers

    return make_tiny_model(tmp_path_factory.mktemp("model"), arch="llama")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory) -> None:
    """Neither the hub nor lm-eval's own tasks, whose thousands of files take seconds to read."""
    import datasets
    import lm_eval.tasks

    alone = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", alone)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


@pytest.fixture
def job(server, folder, tokenizer):
    """Writes a job with the given lm-eval tasks over ROWS; keys of `lm_eval` as keywords."""
    server.tokenizer, server.max_req_input_len = str(tokenizer), 500
    data = folder.data(ROWS)

    def write(*tasks: dict[str, Any] | str, job: dict[str, Any] | None = None, **keys: Any) -> Path:
        own = {"dataset_path": "json", "test_split": "test"}
        own["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        entries = [own | task if isinstance(task, dict) else task for task in tasks]
        job = {"endpoints": [server.url], "tasks": None, "max_in_flight": 4} | (job or {})
        return folder.job(**job, lm_eval={"tasks": entries, "bootstrap_iters": 10} | keys)

    return write


@pytest.fixture
def prompt(tokenizer):
    """The name under which the stand-in knows a text."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: json.dumps(tokens.encode(text))


def results(folder) -> dict[str, Any]:
    (file,) = folder.output.glob("*/results_*.json")
    return json.loads(file.read_text())


def samples(folder, task: str) -> list[dict[str, Any]]:
    (file,) = folder.output.glob(f"*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_results_of_a_model_in_a_hidden_folder_are_not_hidden(server, folder, job, console):
    server.model = ".cache/models/tiny"
    assert run_job(job(CHOICES), console=console) == DONE
    (file,) = folder.output.glob("cache__models__tiny/results_*.json")
    assert json.loads(file.read_text())["results"]["choices"]


def test_all_kinds_of_request(server, folder, job, console):
    path = job(CHOICES, ANSWERS, TEXTS, job={"priority": -1})

    assert run_job(path, console=console) == DONE

    bodies = [body for _, _, body in server.requests]
    assert len(bodies) == 2 * 5 + 5 + 5
    for _, headers, body in server.requests:
        assert headers["x-sgl-conserve-class"] == "offline"
        assert (body["service_tier"], body["priority"]) == ("flex", -1)
    generating = [body for body in bodies if "return_logprob" not in body]
    assert [body["sampling_params"] for body in generating] == 5 * [
        {"max_new_tokens": 7, "temperature": 0.0, "stop": ["\n"]}
    ]
    found = folder.summary()["lm_eval"]
    assert found["run_requests"] == 20
    assert found["partial"] is False
    assert found["online_latency"] is None
    assert found["tasks"]["answers"] == {"exact_match": {"value": 1.0, "stderr": 0.0}}
    assert found["tasks"]["choices"]["acc"]["value"] == 1.0
    assert found["tasks"]["texts"]["word_perplexity"]["value"] > 1
    assert results(folder)["results"]["choices"]["acc,none"] == 1.0
    assert results(folder)["config"]["model"] == "conserve"
    assert {len(samples(folder, task)) for task in ("choices", "answers", "texts")} == {5}
    assert "choices" in console.file.getvalue()


def reply(tokens: list[list[Any]], top: list[Any]) -> Any:
    meta = {"finish_reason": {"type": "length"}, "prompt_tokens": 9, "completion_tokens": 0}
    meta |= {"input_token_logprobs": tokens, "input_top_logprobs": top}
    return read_text(json.dumps({"text": "", "meta_info": meta}).encode())


FIRST = [None, 1, None]  # the last token of the context, which SGLang gives no logprob


@pytest.mark.parametrize(
    ("tokens", "top", "expected"),
    [
        ([[-0.5, 7, None], [-0.25, 8, None]], [7, 8], (-0.75, True)),
        ([[-0.5, 7, None], [-0.25, 8, None]], [7, 9], (-0.75, False)),
        ([[-0.5, 7, None], [-0.25, 8, None]], [9, 8], (-0.75, False)),
        ([[None, 7, None]], [9], (float("-inf"), False)),
    ],
)
def test_loglikelihood_is_the_sum_and_greedy_is_not_inverted(tokens, top, expected):
    from conserve_sgl.jobs.lm_eval.model import score

    likeliest = [None, *([[-0.1, token, None]] for token in top)]
    assert score(reply([FIRST, *tokens], likeliest), len(tokens)) == expected


@pytest.mark.parametrize("max_length", [500, 9])
def test_rolling_scores_every_token_once(server, folder, job, console, prompt, max_length):
    """In one window, or in several: the stand-in's logprob depends on the window alone."""
    run_job(job(TEXTS, limit=2, model_args={"max_length": max_length}), console=console)
    texts = [json.loads(prompt(row["question"])) for row in ROWS[:2]]
    bodies = [body for _, _, body in server.requests]
    scored = [body["input_ids"][body["logprob_start_len"] + 1 :] for body in bodies]
    assert all(len(body["input_ids"]) < max_length for body in bodies)
    assert sorted(chain(*scored)) == sorted(chain(*texts))
    logprobs = [
        -body["input_ids"].count(token) / 10
        for body, tokens in zip(bodies, scored, strict=True)
        for token in tokens
    ]
    found = [float(sample["resps"][0][0]) for sample in samples(folder, "texts")]
    assert sum(found) == pytest.approx(sum(logprobs))


def test_a_long_context_loses_its_beginning(server, job, console):
    run_job(job(CHOICES, limit=1, model_args={"max_length": 8}), console=console)
    for _, _, body in server.requests:
        assert len(body["input_ids"]) == 7
        assert body["logprob_start_len"] == 7 - len(" xyz") - 1


def test_a_text_that_is_too_long_to_score_ends_the_run(server, job, console):
    with pytest.raises(JobError, match=r"has 4 tokens, .* more than max_length 4"):
        run_job(job(CHOICES, limit=1, model_args={"max_length": 4}), console=console)
    assert server.requests == []


def test_a_reply_with_too_few_logprobs_is_asked_for_again():
    from conserve_sgl.jobs.lm_eval.model import score

    with pytest.raises(BadReply, match="0 logprobs and not 2"):
        score(reply([FIRST], [None]), 2)
    with pytest.raises(BadReply):  # no text is certain because nothing of it was scored
        score(reply([FIRST], [None]), 0)


def first_words(words: list[str]) -> dict[str, Any]:
    """A task whose choices go on where the context stops, within a word."""
    return CHOICES | {
        "doc_to_text": "The sky is bl",
        "target_delimiter": "",
        "doc_to_choice": words,
    }


def bare(context: str, continuation: str) -> dict[str, Any]:
    """A task that scores the same text for each row."""
    task = {"task": "bare", "output_type": "loglikelihood", "target_delimiter": ""}
    task |= {"doc_to_text": context, "doc_to_target": continuation}
    return task | {"metric_list": [{"metric": "acc"}]}


@pytest.fixture
def merging(tmp_path) -> Path:
    """A tokenizer that has "blue" as one token and "b", "l", "u", "e" as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*pre_tokenizers.ByteLevel.alphabet(), "bl", "ue", "blue", "<s>"]
    vocab = {token: i for i, token in enumerate(letters)}
    merges = [("b", "l"), ("u", "e"), ("bl", "ue")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    fast.save_pretrained(tmp_path / "merging")
    return tmp_path / "merging"


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (first_words(["ue", "ack"]), "'ue' after 'The sky is bl' has no token of its own"),
        (bare("The sky is bl", ""), "'' after 'The sky is bl' has no token of its own"),
        (bare("", "<s>"), "'<s>' has no token of its own"),
        (bare("{{ '  ' }}", "blue"), "'  ' before 'blue' has no token"),
        (bare("", ""), "'' has no token of its own"),
    ],
)
def test_a_continuation_without_tokens_is_refused(server, job, console, merging, task, said):
    path = job(task, model_args={"tokenizer": str(merging)})
    with pytest.raises(JobError, match=said):
        run_job(path, console=console)
    assert server.requests == []


def test_a_continuation_that_keeps_a_token_of_its_own_is_scored(server, job, console, merging):
    """As transformers-based lm-eval scores it: what follows the context's number of tokens."""
    run_job(
        job(first_words(["ued", "ack"]), model_args={"tokenizer": str(merging)}), console=console
    )
    bodies = [body for _, _, body in server.requests]
    assert len(bodies) == 2 * len(ROWS)
    assert {len(body["input_ids"]) - body["logprob_start_len"] - 1 for body in bodies} == {1, 3}


def test_a_rolling_text_without_tokens_is_refused(server, job, console, merging, monkeypatch):
    from conserve_sgl.jobs.lm_eval.model import ConserveLM

    encode = ConserveLM.tok_encode

    def blind(self, text, *args, **kwargs):  # as a tokenizer that drops what it does not know
        return [] if "sideways" in text else encode(self, text, *args, **kwargs)

    monkeypatch.setattr(ConserveLM, "tok_encode", blind)
    with pytest.raises(JobError, match="'what is sideways\\?' has no token of its own"):
        run_job(job(TEXTS, model_args={"tokenizer": str(merging)}), console=console)
    assert server.requests == []


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({}, {"temperature": 0.0, "max_new_tokens": 256, "stop": []}),
        ({"until": "\n"}, {"stop": ["\n"]}),
        ({"until": ["a", ""]}, {"stop": ["a"]}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"seed": 5}, {"sampling_seed": 5}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_generation_parameters_are_translated(given, sent):
    from conserve_sgl.jobs.lm_eval.model import generate_body

    body = generate_body([1, 2], given, 256)
    assert body["input_ids"] == [1, 2]
    assert body["sampling_params"].items() >= sent.items()
    assert "do_sample" not in body["sampling_params"]


def test_an_unknown_generation_parameter_is_refused(server, job, console):
    with pytest.raises(InputError, match=r"gen_kwargs: answers: .*parameter 'num_beams'"):
        run_job(job(ANSWERS, gen_kwargs={"num_beams": 2}), console=console)
    assert server.requests == []


LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def answers(**generation: Any) -> dict[str, Any]:
    return ANSWERS | {"generation_kwargs": {"until": ["\n"]} | generation}


@pytest.mark.parametrize(
    ("task", "keys", "where"),
    [
        *((answers(**{name: 99}), {}, "lm_eval.tasks") for name in LIMITS),
        *((ANSWERS, {"gen_kwargs": {name: 100}}, "lm_eval.gen_kwargs") for name in LIMITS),
        (answers(), {"model_args": {"max_length": 100, "max_gen_toks": 100}}, "lm_eval.tasks"),
    ],
)
def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(
    server, job, console, task, keys, where
):
    keys = {"model_args": {"max_length": 100}} | keys
    said = rf"{where}: answers: max_gen_toks (99|100) leaves no token .* max_length 100"
    with pytest.raises(InputError, match=said):
        run_job(job(CHOICES, task, **keys), console=console)
    assert server.requests == []


@pytest.mark.parametrize("name", LIMITS)
def test_room_is_made_for_an_answer_whatever_its_limit_is_called(server, job, console, name):
    task = answers(**{name: 94})
    run_job(job(task, model_args={"max_length": 100}), console=console)
    for _, _, body in server.requests:
        assert len(body["input_ids"]) == 5
        assert body["sampling_params"]["max_new_tokens"] == 94


@pytest.mark.parametrize("name", LIMITS)
def test_the_jobs_limit_replaces_a_tasks_of_another_name(server, job, console, name):
    for own in LIMITS:
        server.requests.clear()
        run_job(job(answers(**{own: 7}), gen_kwargs={name: 3}), console=console, fresh=True)
        assert {body["sampling_params"]["max_new_tokens"] for _, _, body in server.requests} == {3}


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": float("inf")},
        {"temperature": "warm"},
        {"top_p": 2},
        {"max_gen_toks": "many"},
        {"max_gen_toks": 0},
        {"max_gen_toks": -5},
        {"until": [5]},
        {"until": ["a"] * 33},
        {"regex": "((("},
        {"seed": 10**23},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_generation_that_would_fail_every_question_is_refused(server, job, console, generation):
    with pytest.raises(InputError, match=r"lm_eval\.tasks(: (answers|cannot)|\[0\])"):
        run_job(job(answers(**generation)), console=console)
    with pytest.raises(InputError, match=r"lm_eval\.gen_kwargs(: answers|\.)") as e:
        run_job(job(ANSWERS, gen_kwargs=generation), console=console)
    assert "`" not in str(e.value)  # as msgspec puts it
    assert server.requests == []


def test_busy_servers_are_waited_for(server, folder, job, console, prompt):
    server.script[prompt("Q: what is up?\nA:")] = [(429, {"Retry-After": "0"}), (503, {})] * 20
    assert run_job(job(ANSWERS), console=console) == DONE
    assert folder.summary()["lm_eval"]["run_retries"] == 40
    assert results(folder)["results"]["answers"]["exact_match,none"] == 1.0


def test_what_was_answered_is_not_asked_again(server, folder, job, console, prompt):
    """One request is refused for good: the others are kept, and it alone is asked again."""
    refused = prompt("Q: what is up?\nA:")
    server.script[refused] = [(400, {})]
    path = job(CHOICES, TEXTS, ANSWERS)
    with pytest.raises(JobError, match=r"1 of 5 requests of generate_until failed.*scripted"):
        run_job(path, console=console)
    summary = folder.summary()
    assert (summary["partial"], summary["lm_eval"]["run_requests"]) == (True, 19)
    server.prompts.clear()

    assert run_job(path, console=console) == DONE

    assert server.prompts == {refused: 1}
    assert folder.summary()["lm_eval"]["run_requests"] == 1
    assert folder.summary()["partial"] is False
    assert results(folder)["results"]["answers"]["exact_match,none"] == 1.0


def test_an_interrupt_keeps_what_is_in_flight(server, folder, job, console):
    screen = Screen("stopping: 60 s for what is in flight")
    path = job(ANSWERS, job={"drain_s": 60, "max_in_flight": 2})
    server.hold.clear()

    def interrupt() -> None:
        server.wait_until(lambda s: len(s.requests) == 2)
        os.kill(os.getpid(), signal.SIGINT)
        screen.seen.wait(60)
        server.hold.set()

    with ThreadPoolExecutor(1) as pool:
        interrupted = pool.submit(interrupt)
        assert run_job(path, console=Console(file=screen, width=120)) == INTERRUPTED
        interrupted.result()
    assert folder.summary()["partial"] is True
    assert list(folder.output.glob("*/results_*")) == []

    assert run_job(path, console=console) == DONE
    assert set(server.prompts.values()) == {1}
    assert folder.summary()["lm_eval"]["run_requests"] == 3


def test_fresh_asks_again(server, job, console):
    path = job(ANSWERS)
    run_job(path, console=console)
    server.requests.clear()
    assert run_job(path, console=console, fresh=True) == DONE
    assert len(server.requests) == 5


def test_another_model_never_sees_the_answers_of_this_one(server, folder, job, console):
    cache = str(folder.path / "cache")
    run_job(job(ANSWERS, use_cache=cache), console=console)
    server.requests.clear()
    server.model = "other"
    other = {"output": str(folder.path / "other")}
    run_job(job(ANSWERS, use_cache=cache, job=other), console=console)
    assert len(server.requests) == 5


def test_jsonl_tasks_and_several_endpoints(server, second_server, folder, job, console):
    task = {"name": "lines", "data": "data.jsonl", "prompt": "{{ question }}"}
    urls = [server.url, second_server.url]
    path = job(CHOICES, job={"tasks": [task], "endpoints": urls, "max_in_flight": 8})
    assert run_job(path, console=console) == DONE
    assert len(folder.records("lines")) == 5
    summary = folder.summary()
    assert (summary["run_lines"], summary["lm_eval"]["run_requests"]) == (5, 10)
    assert second_server.requests
    assert len(server.requests) + len(second_server.requests) == 15


def test_a_chat_template_is_applied(folder, job, console):
    path = job(ANSWERS, limit=1, apply_chat_template=True, system_instruction="Be brief.")
    run_job(path, console=console)
    text = samples(folder, "answers")[0]["arguments"]["gen_args_0"]["arg_0"]
    assert text.startswith("<|im_start|>system\nBe brief.")
    assert text.endswith("<|im_start|>assistant\n")


def test_the_limit_of_the_command_line_counts(server, job, console):
    run_job(job(ANSWERS), console=console, limit=2)
    assert len(server.requests) == 2


def test_a_known_task_with_other_values(folder, job, console):
    """What lm-eval itself does by an include: here the file of the data, and the question."""
    (folder.path / "own").mkdir()
    (folder.path / "own" / "answers.yaml").write_text(yaml.safe_dump(ANSWERS))
    changed = {"task": "answers", "doc_to_text": "{{question}}", "doc_to_target": "14"}
    run_job(job(changed, limit=1, include_path="own"), console=console)
    assert results(folder)["results"]["answers"]["exact_match,none"] == 0.0
    assert samples(folder, "answers")[0]["arguments"]["gen_args_0"]["arg_0"] == "what is up?"


def test_the_job_we_ship_finds_its_tasks_and_their_data(checkout, shared_data, monkeypatch):
    monkeypatch.setenv("CONSERVE_DATA", str(shared_data))
    path = checkout / "configs" / "jobs" / "lm_eval.yaml"
    loaded = load_tasks(path, make_plan(path).job.lm_eval)
    arc_easy, gsm8k = loaded.tasks
    assert (len(arc_easy.test_docs()), len(gsm8k.test_docs())) == (2376, 1319)
    assert arc_easy.doc_to_text(arc_easy.test_docs()[0]).startswith("Question: Which statement")
    assert arc_easy.doc_to_target(arc_easy.test_docs()[0]) == 0
    assert gsm8k.doc_to_target(gsm8k.test_docs()[0]) == "18"


@pytest.mark.parametrize(
    ("tasks", "keys", "fault"),
    [
        (["no_such_task"], {}, r"lm_eval.tasks\[0\]: lm-eval has no task 'no_such_task'"),
        (["no.yaml"], {}, r"lm_eval.tasks\[0\]: no such file: "),
        ([CHOICES], {"include_path": "nowhere"}, "lm_eval.include_path: no such folder: "),
        ([CHOICES | {"test_split": "no"}], {}, "lm_eval.tasks: cannot be loaded: "),
        ([CHOICES], {"device": "cpu"}, r"lm_eval.device: unknown key"),
        ([CHOICES], {"model": "hf"}, "lm_eval.model: "),
        ([CHOICES], {"model_args": {"dtype": "auto"}}, "lm_eval.model_args.dtype: unknown key"),
        ([CHOICES], {"limit": 2, "samples": {"choices": [1]}}, "samples: cannot be given together"),
        ([CHOICES], {"seed": [1, 2]}, "seed: one number, or four"),
        ([CHOICES], {"fewshot_as_multiturn": True}, "needs apply_chat_template"),
        ([{"task": None}], {}, "cannot be loaded: "),
        ([CHOICES], {"output_path": "/proc/x"}, r"lm_eval\.output_path: cannot write /proc/x: "),
        ([CHOICES], {"use_cache": "/proc/x/c"}, r"lm_eval\.use_cache: cannot write /proc/x: "),
        ([CHOICES], {"use_cache": ""}, r"lm_eval\.use_cache: is empty"),
        ([], {}, "lm_eval.tasks: "),
    ],
)
def test_bad_input_is_found_before_anything_is_sent(server, job, console, tasks, keys, fault):
    with pytest.raises(InputError, match=fault):
        run_job(job(*tasks, **keys), console=console)
    assert server.requests == []


def test_a_task_that_fails_while_it_is_evaluated_is_named(folder, job, console):
    """A task is code of someone else's: here one that fails on its last line."""
    folder.data([*ROWS, ROWS[0] | {"answer": 1}])
    failing = CHOICES | {"doc_to_text": "{{ 1 // (1 - answer) }}"}
    with pytest.raises(JobError, match=r"lm-eval failed at .*:\d+: ZeroDivisionError: .* are kept"):
        run_job(job(failing), console=console)
    assert folder.summary()["partial"] is True


def test_the_server_has_to_say_what_the_job_does_not(server, job, console):
    path = job(CHOICES)
    server.max_req_input_len = None
    with pytest.raises(InputError, match=r"lm_eval\.model_args\.max_length: is needed"):
        run_job(path, console=console)
    assert server.requests == []


def test_a_tokenizer_that_is_not_there_is_found_before_anything_is_sent(server, job, console):
    task = {"name": "lines", "data": "data.jsonl", "prompt": "{{ question }}"}
    path = job(CHOICES, model_args={"tokenizer": "/no/such"}, job={"tasks": [task]})
    with pytest.raises(InputError, match=r"lm_eval\.model_args\.tokenizer: cannot load /no/such"):
        run_job(path, console=console)
    assert server.requests == []


def test_a_server_that_wants_a_key_ends_the_run(server, job, console, monkeypatch):
    server.api_key = "secret"
    with pytest.raises(JobError, match="/model_info: 401"):
        run_job(job(CHOICES), console=console)
    monkeypatch.setenv("KEY", "secret")
    assert run_job(job(CHOICES, job={"api_key_env": "KEY"}), console=console) == DONE


def test_without_the_extra_the_error_says_what_to_install(server, job, console, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install conserve-sgl\[eval\]"):
        run_job(job(CHOICES), console=console)
    assert server.requests == []
