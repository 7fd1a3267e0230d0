"""The course: the handout holds no answer, and the grader tells right from wrong, and why."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "assignments"))

import catalogue  # noqa: E402
import faults  # noqa: E402
import grade  # noqa: E402
import make  # noqa: E402
import sandbox  # noqa: E402
import source  # noqa: E402
import tasks  # noqa: E402
from sandbox import Job, run_all  # noqa: E402

REFERENCE = source.reference()
CODE = source.CODE_ITEMS
VARIANTS = (None, *catalogue.VARIANTS)
KEY = {f"run_{k}": {"fault": fault, "shows": {metric: [3]}} for k, (fault, metric) in enumerate(
    [("clones", "diversity"), ("kl_runaway", "kl"), ("weights_reset", "kl"),
     ("missing_rewards", "missing"), ("no_spread", "reward_std"), ("reward_hacking", "verified")],
    start=1)}
RIGHT_ANSWERS = "".join(
    f'[{run}]\nfault = "{answer["fault"]}"\nstep = 3\nmetric = "{next(iter(answer["shows"]))}"\n'
    for run, answer in KEY.items())
SOLUTION = (ROOT / "assignments/solution/my_reward.py").read_text()


def grade_items(text, *names, variant=None, seed=1):
    """The Results of some items of a submission's argrpo.py: {id: Result}."""
    grader = grade.Grader(text, seed, variant)
    return grader.grade([CODE[name] for name in names])[0]


def with_blank(name, text=REFERENCE):
    return source.with_blank(text, CODE[name])


def submission(folder, text, reward=SOLUTION, answers=RIGHT_ANSWERS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "argrpo.py").write_text(text)
    (folder / "my_reward.py").write_text(reward)
    (folder / "answers.toml").write_text(answers)
    return folder


# --- the assignment as a text ------------------------------------------------------------------

def test_points_add_up_and_every_item_has_all_it_needs():
    assert sum(item["points"] for item in source.ITEMS.values()) == 100
    for name, item in source.ITEMS.items():
        assert len(item["hints"]) == 2 and item["read"], name
    for name in CODE:
        assert len(grade.checks.of_item(name)) >= 3, name
        assert len(source.read_toml(f"right/part{name[0]}.toml")[name]) == 3, name
    assert len(faults.FAULTS) == 15
    assert sum(score for _, _, score, _ in tasks.score_debug(None, KEY)) == 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_least_five_mistakes_an_item_also_in_the_variants(variant):
    text = source.reference(variant)
    for name, item in CODE.items():
        mistakes = grade.mistakes_of(item, text)
        assert len(mistakes) >= 5, (name, len(mistakes))
        if variant is None:
            continue
        says = [mistake.says for mistake in mistakes]
        assert len(set(says)) == len(says)


@cache
def statements_of_solutions(variant=None):
    """The longer statements of all bodies that are blank in the handout, as syntax trees."""
    text = source.reference(variant)
    for item in CODE.values():
        for node in ast.walk(ast.parse(source.body(text, item).replace("return ", "got = "))):
            if isinstance(node, (ast.Assign, ast.Expr)):
                dumped = ast.dump(node.value)
                if len(dumped) > 250 and not isinstance(node.value, ast.Constant):
                    yield item["id"], dumped


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_blank_file_holds_no_solution_and_keeps_its_signatures(variant):
    blank, whole = make.blanked(variant), source.reference(variant)
    left = {ast.dump(node) for node in ast.walk(ast.parse(blank)) if isinstance(node, ast.expr)}
    for name, statement in statements_of_solutions(variant):
        assert statement not in left, name
    for name, item in CODE.items():
        assert f"part {name}: " in blank
        if "function" in item:
            ours, theirs = (source.find_function(source.parse(text), item["function"])
                            for text in (whole, blank))
            assert ast.dump(ours.args) == ast.dump(theirs.args)
            assert (ast.get_docstring(ours) is None) == (ast.get_docstring(theirs) is None)
    assert max(map(len, blank.splitlines())) <= 100


def test_pasting_every_body_back_gives_the_reference():
    text = make.blanked()
    for name in sorted(CODE, reverse=True):
        text = source.with_body(text, CODE[name], source.body(REFERENCE, CODE[name]))
    got, wanted = ast.parse(text), ast.parse(REFERENCE)
    for tree in (got, wanted):                   # docstrings may differ
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                node.body[0].value = ast.Constant("")
    assert ast.unparse(got) == ast.unparse(wanted)


# --- the sandbox -------------------------------------------------------------------------------

def test_the_sandbox_survives_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def loop():
        while True:
            pass

    def hoard():
        return len(bytearray(2 ** 33))

    def hoard_tensors():
        return torch.ones(2 ** 31)

    def fork_and_exit():
        os._exit(0)

    def delete_here():
        for path in Path.cwd().iterdir():
            path.unlink()
        os.rmdir(Path.cwd())
        return "fine"

    jobs = {"loop": loop, "exit": lambda: sys.exit(0), "_exit": fork_and_exit, "hoard": hoard,
            "tensors": hoard_tensors, "delete": delete_here,
            "print": lambda: print('{"tests": []}') or 3,
            "crash": lambda: os.kill(os.getpid(), 11), "right": lambda: torch.ones(2)}
    outcomes = run_all([Job(name, job, 1) for name, job in jobs.items()])
    assert "does not end" in outcomes["loop"].error
    assert "exit" in outcomes["exit"].error
    assert "without an answer" in outcomes["_exit"].error
    assert "without an answer" in outcomes["crash"].error
    for name in ("hoard", "tensors"):
        assert "it needs more than 2.5 GB of memory" in outcomes[name].error, name
    assert outcomes["delete"].value == "fine" and outcomes["print"].value == 3
    assert outcomes["right"].value.tolist() == [1.0, 1.0]
    assert not list(tmp_path.iterdir()), "a folder of a child's is left behind"


# --- grading -----------------------------------------------------------------------------------

QUICK = ("2.3", "2.4")


def test_what_a_submission_has_started_ends_with_it(tmp_path):
    file = tmp_path / "alive"

    def start():
        if os.fork() == 0:
            os.closerange(3, 256)                # so that nobody waits for its answer
            for k in range(200):
                file.write_text(str(k))
                time.sleep(0.02)
            os._exit(0)
        while not file.exists():
            time.sleep(0.01)
    run_all([Job("start", start, 1)])
    before = file.read_text()
    time.sleep(0.2)
    assert file.read_text() == before, "a process of the submission's is still there"


def test_an_error_in_the_references_part_is_reported_without_a_line():
    """It would be none of the submission's."""
    for line, place in ((3, "argrpo.py, line 3: "), (source.NO_LINE + 3, "")):
        with pytest.raises(ZeroDivisionError) as caught:
            exec(compile("\n" * (line - 1) + "1 / 0", "argrpo.py", "exec"), {})
        assert sandbox.in_words(caught.value) == f"{place}ZeroDivisionError: division by zero"


def test_right_answers_get_full_points():
    results = grade_items(REFERENCE, *QUICK)
    assert all(r.score == r.points for r in results.values())


def test_a_blank_costs_its_own_points_and_names_its_part():
    results = grade_items(with_blank("2.3"), *QUICK)
    assert results["2.3"].score == 0 and "part 2.3: group_advantages" in results["2.3"].output
    assert results["2.4"].score == results["2.4"].points


def test_a_classic_mistake_is_explained():
    mistake = next(m for m in grade.mistakes_of(CODE["2.3"], REFERENCE)
                   if "are those of the batch" in m.says)
    result = grade_items(source.with_bug(REFERENCE, mistake), "2.3")["2.3"]
    assert 0 < result.score < result.points
    assert result.output.startswith(mistake.says) and "step 4" in result.output


def test_an_unknown_mistake_is_shown_with_its_smallest_input():
    text = source.with_body(REFERENCE, CODE["2.4"], "return (ref_logp - logp).exp() * 0.3")
    output = grade_items(text, "2.4")["2.4"].output
    assert "not so: where policy and reference agree it is zero" in output
    for mistake in grade.mistakes_of(CODE["2.4"], REFERENCE):
        assert mistake.says not in output, "the explanation of a mistake that was not made"
    assert "for kl_k3([[" in output and "expected [[0.0]]" in output and "got      [[0.3" in output


def test_a_failure_shows_the_call_and_the_first_value_that_is_wrong():
    module = SimpleNamespace(f=lambda x, k: (x, k))
    with grade.watched(module, {"function": "f", "values": 2}) as calls:
        module.f(torch.tensor([0.5, 1.0]), k=torch.zeros(3, 9))
    assert calls == ["f([0.5, 1.0], k=float32 (3, 9))"], "few numbers, or the shape"
    check = grade.checks.of_item("2.5")[0]
    right, wrong = torch.zeros(3, 9), torch.zeros(3, 9)
    wrong[1, 2] = 7
    text = grade.describe(check, calls, [1.0, wrong], [1.0, right])
    assert calls[0] in text and "expected 0.0 at [1, 2]\n  got      7.0 at [1, 2]" in text
    assert "expected 2.0\n  got      nothing" in grade.describe(check, [], [1.0], [1.0, 2.0])
    with grade.watched(module, {"function": "f", "values": 3}):
        with pytest.raises(TypeError, match="f must return 3 values, not 2"):
            module.f(1, 2)


def test_helpers_of_the_students_own_come_along():
    text = source.with_body(REFERENCE, CODE["2.4"], "return my_k3(logp, ref_logp)")
    text += "\nimport math as m\n\ndef my_k3(a, b):\n    return m.e ** (b - a) - (b - a) - 1\n"
    assert grade_items(text, "2.4")["2.4"].score == 3


def test_methods_that_a_student_has_added_come_along():
    """Attention.forward does its work in a method of its own."""
    attention = next(node for node in ast.parse(REFERENCE).body
                     if isinstance(node, ast.ClassDef) and node.name == "Attention")
    forward = next(node for node in attention.body if getattr(node, "name", "") == "forward")
    lines = REFERENCE.splitlines()
    added = "\n".join(lines[forward.lineno - 1:forward.end_lineno]).replace("forward", "mine", 1)
    text = source.with_body(REFERENCE, CODE["1.3"], "return self.mine(x, rope, mask)")
    head = "class Attention(nn.Module):\n"
    text = text.replace(head, f"{head}{added}\n\n")
    result = grade_items(text, "1.3")["1.3"]
    assert result.score == result.points, result.output


def test_answers_to_other_items_do_not_come_along():
    """The loss, 2.5, calls the estimate of the KL, 2.4: a wrong one costs its own points alone."""
    text = source.with_body(REFERENCE, CODE["2.4"], "return logp * 0 + 7")
    result = grade_items(text, "2.5")["2.5"]
    assert result.score == result.points, result.output


@pytest.mark.parametrize("wrong, other", [("1.3", "1.4"), ("1.4", "1.3")])
def test_wrong_methods_of_a_class_do_not_come_along(wrong, other):
    """Attention has two items, each a method, and what both call is none."""
    text = source.with_body(REFERENCE, CODE[wrong], "return 1 / 0")
    text = source.with_body(text, CODE[wrong] | {"function": "Attention.qkv"}, "return 1 / 0")
    result = grade_items(text, other)[other]
    assert result.score == result.points, result.output


@pytest.mark.parametrize("seed, variant", [(1, None), (8, "loo")])
def test_the_seed_of_the_hidden_inputs_and_the_variant_reach_the_grader(seed, variant, tmp_path,
                                                                        monkeypatch):
    graders = []

    def note(grader, items, more=()):
        graders.append(grader)
        return {}, {}
    monkeypatch.setattr(grade.Grader, "grade", note)
    grade.grade(submission(tmp_path, REFERENCE), seed, variant, KEY, only=["2.4"])
    assert [(grader.seed, grader.variant) for grader in graders] == [(seed, variant)]


def test_a_check_has_its_own_tolerance(monkeypatch):
    """Where a right answer may draw in another way than the reference."""
    monkeypatch.setattr(grade.checks, "CHECKS", [])
    grade.checks.check("1.8", "what is drawn is likely enough", tolerance=0.25)(len)
    grade.checks.check("2.4", "it is exact")(len)
    assert [check.tolerance for check in grade.checks.CHECKS] == [0.25, 1e-5]


def test_a_variants_public_tests_expect_what_the_variant_computes(monkeypatch):
    """loo: an advantage is the distance to the mean of the others."""
    monkeypatch.setattr(grade.checks, "CHECKS", grade.checks.of_item("2.3"))
    published, loo = make.expected(None), make.expected("loo")
    assert published.keys() == loo.keys()
    wrong = [check for check in grade.checks.CHECKS if not all(
        grade.same(a, b, 1e-5) for a, b in zip(published[check.says], loo[check.says]))]
    assert wrong, "the published objective fails the variant's tests"


@pytest.mark.parametrize("given, chosen", [([], 7), (["--debug-seed", "0"], 0)])
def test_the_seed_of_the_runs_to_debug_is_the_one_that_is_given(given, chosen, tmp_path,
                                                                monkeypatch):
    """Without one, nobody can guess it."""
    monkeypatch.setattr(make.secrets, "randbelow", lambda limit: 7 if limit > 2 ** 40 else 1)
    monkeypatch.setattr(make, "make_handout", lambda out, seed, variant: {"debug_seed": seed})
    make.main(["--out", str(tmp_path / "handout"), *given])
    assert json.loads((tmp_path / "handout.key.json").read_text()) == {"debug_seed": chosen}


def test_an_error_is_reported_with_its_line():
    text = source.with_body(REFERENCE, CODE["2.4"], "x = 1\nreturn nothing")
    line = 1 + text.splitlines().index("    return nothing")
    assert f"argrpo.py, line {line}: NameError" in grade_items(text, "2.4")["2.4"].output


def test_a_file_that_is_no_python_is_reported_with_its_line(tmp_path):
    results = grade.grade(submission(tmp_path, "x = 1\ndef f(:\n"), key=KEY, only=["2.4"])
    assert results[0].score == 0 and "line 2" in results[0].output


HOSTILE = {
    "loop": "while True:\n    pass",
    "exit": "import sys\nsys.exit(0)",
    "crash": "import os\nos._exit(0)",
    "fake": "print('{\"tests\": [{\"score\": 100, \"max_score\": 100}]}')\nreturn logp * 0 - 7",
    "delete": "import os, shutil\nfor n in os.listdir('.'):\n    os.remove(n)\n"
              "d = ref_logp - logp\nreturn d.exp() - d - 1",
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("exit", "fake") else pytest.mark.course)
    for name in HOSTILE])
def test_hostile_bodies_get_the_right_score(name, tmp_path):
    """An exit, a crash, an endless loop and a printed result cost the item's points, and no others;
    who deletes files in the folder and is right has full points."""
    folder = submission(tmp_path, source.with_body(REFERENCE, CODE["2.4"], HOSTILE[name]))
    results = {r.name[:3]: r for r in grade.grade(folder, key=KEY, only=["1.5", "2.4"])}
    assert results["1.5"].score == 2, "other items keep their points"
    assert results["2.4"].score == (3 if name == "delete" else 0), results["2.4"].output
    assert sorted(os.listdir(folder)) == ["answers.toml", "argrpo.py", "my_reward.py"]


def test_what_is_right_for_the_smallest_input_alone_is_wrong():
    """Every check has three sizes: two numbers are the smallest that 2.4 is given."""
    text = source.with_body(REFERENCE, CODE["2.4"], "d = ref_logp - logp\n"
                            "k3 = d.exp() - d - 1\nreturn k3 if d.numel() <= 2 else k3 + 1")
    result = grade_items(text, "2.4")["2.4"]
    assert result.score == 0, f"only the smallest of three sizes is compared: {result.output}"


def test_the_grader_compares_number_shape_and_kind_of_what_is_returned():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert grade.same([x, y], [x.clone(), y.clone()], 1e-5)
    for what, got in {"too few values": [x], "too many values": [x, y, y], "no value": [],
                      "another order": [y, x], "another shape": [x[None], y],
                      "whole numbers": [x.long(), y], "a text": ["1", y],
                      "another value": [x + 1e-3, y], "NaN": [x * torch.nan, y]}.items():
        assert not grade.same(got, [x, y], 1e-5), f"{what} must not pass as the right answer"


def test_an_error_at_one_size_costs_the_check():
    """Whoever fails for larger inputs is not done."""
    text = source.with_body(REFERENCE, CODE["2.4"], "d = ref_logp - logp\nassert d.numel() <= 2\n"
                            "return d.exp() - d - 1")
    result = grade_items(text, "2.4")["2.4"]
    assert result.score == 0 and "AssertionError" in result.output, (
        f"an error is no right answer: {result.output}")


def test_answers_about_the_runs():
    right = tasks.score_debug(RIGHT_ANSWERS, KEY)
    assert [(score, points) for _, score, points, _ in right] == [(2.0, 2.0)] * 6
    wrong = RIGHT_ANSWERS.replace('"clones"', '"no_spread"').replace("step = 3", "step = 4")
    scores = [score for _, score, _, _ in tasks.score_debug(wrong, KEY)]
    assert scores == [0.0] + [1.0] * 5
    assert all("cannot be read" in output for *_, output in tasks.score_debug("= 1", KEY))
    several = RIGHT_ANSWERS.replace('"clones"', '["clones", "no_spread"]')
    (_, score, _, output), *others = tasks.score_debug(several, KEY)
    assert score == 0 and "fault must be one name in quotes" in output
    assert [score for _, score, _, _ in others] == [2.0] * 5, "the other runs' answers count"


@pytest.mark.parametrize("wanted, right, share", [
    (0.53, 0.61, 1.0),                           # pays for right and large pictures
    (0.35, 0.53, 0.38),                          # pays for size alone, in one run
    (0.40, 0.43, 0.0),                           # and in another
    (0.20, 0.90, 0.0)])                          # pays for right pictures alone
def test_part_41_wants_large_shapes_and_right_pictures(wanted, right, share):
    score, points, says = tasks.score_reward(sandbox.Outcome((wanted, right)),
                                             source.ITEMS["4.1"])
    assert score == pytest.approx(share * points, abs=0.15)
    assert (share == 1) == ("measure is met" in says)


def test_changed_points_count_in_the_runs_too(monkeypatch):
    monkeypatch.setitem(source.ITEMS["4.2"], "points", 18)
    graded = tasks.score_debug(RIGHT_ANSWERS, KEY)
    assert [points for _, _, points, _ in graded] == [3] * 6 == [score for _, score, *_ in graded]


def test_gradescope_results():
    results = [grade.Result("1.1 rope_table", 2.5, 5, "text"), grade.Result("whole", 0, 0, "x")]
    tests = grade.gradescope(results)["tests"]
    assert tests[0] == {"name": "1.1 rope_table", "score": 2.5, "max_score": 5, "output": "text",
                        "visibility": "visible"}
    late = grade.gradescope([grade.Result("4.2 run_1", 0, 2, "the fault is not ..")])["tests"]
    assert late[0]["visibility"] == "after_due_date", "whoever may try again finds the fault"
    assert "2.50 / 5" in grade.table(results)


# --- faults ------------------------------------------------------------------------------------

@pytest.mark.course
def test_a_fault_shows_where_it_should_and_not_before(tmp_path):
    made = faults.make_run(tmp_path, "missing_rewards", steps=4, start=2, prompts_per_step=1,
                           group_size=4)
    assert made["shows"]["missing"] and min(made["shows"]["missing"]) >= 2
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and "verified" in rows[0]
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["steps"] == 4


def test_the_settings_beside_a_run_are_those_that_its_author_meant(tmp_path, monkeypatch):
    """A fault doubles the learning rate: who reads it in config.json has not found it."""
    monkeypatch.setattr(faults.Rig, "run", lambda rig: iter(()))
    with pytest.raises(RuntimeError, match="does not show"):         # it has no steps
        faults.make_run(tmp_path, "reversed_reward", steps=2, start=0)
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    rig = faults.Rig(0, 2, 0, {})
    meant = rig.config.lr
    faults.reversed_reward(rig)
    assert settings["lr"] == meant != rig.config.lr


def test_the_pictures_of_a_run_are_rounded(tmp_path):
    from PIL import Image
    faults.draw_rows(tmp_path / "rows.png", [torch.full((2, 3, 4, 4), 0.999)] * 3, scale=2)
    pixels = Image.open(tmp_path / "rows.png")
    assert pixels.size == (2 * 2 * 4, 3 * 2 * 4) and pixels.getextrema() == ((255, 255),) * 3


@pytest.mark.course
@pytest.mark.parametrize("fault", [*faults.FAULTS, faults.HEALTHY])
def test_every_fault_shows(fault, tmp_path):
    made = faults.make_run(tmp_path, fault, seed=1)
    rows = read_metrics(tmp_path)
    assert made["fault"] == fault and len(rows) == 20
    if fault == faults.HEALTHY:
        for name in ("mismatch", "missing", "ratio_max", "grad_norm", "diversity", "entropy"):
            for other, entry in faults.FAULTS.items():
                if name in entry.shown_by:
                    assert not faults.where_shown(other, name, rows), (other, name)
        return
    assert all(made["shows"].values())


# --- the whole matrix --------------------------------------------------------------------------

def outcomes_of(grader, item, texts):
    """What the checks of an item compute with each text, in one child a text: {name: Results}."""
    these = grade.checks.of_item(item["id"])
    jobs = [Job("right", lambda: {check.says: grade.compute(
        grader.reference, check, grader.seed) for check in these}, 60)]
    jobs += [Job((name,), lambda text=text: grader.grafted(text, item, these), 60)
             for name, text in texts.items()]
    outcomes = run_all(jobs)
    wrong = {}
    for name in texts:
        assert not outcomes[name,].error, (name, outcomes[name,].error)
        each = {(item["id"], check.says): sandbox.Outcome(outcomes[name,].value[check.says])
                for check in these}
        each[item["id"], "right"] = outcomes["right"]
        wrong[name] = grader.compare(item, each)
    return wrong, {name: outcomes[name,].value for name in texts}


@pytest.mark.course
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CODE)
def test_every_mistake_loses_points_and_is_explained(name, variant):
    item, grader = CODE[name], grade.Grader("", 1, variant)
    text = grader.reference.__source__
    if variant and source.body(text, item) == source.body(REFERENCE, item):
        pytest.skip("the variant leaves this item as it is")
    mistakes = {m.says: m for m in grade.mistakes_of(item, text)}
    texts = {k: source.with_bug(text, m) for k, m in mistakes.items()}
    wrong, values = outcomes_of(grader, item, texts)
    for k in mistakes:
        assert wrong[k], f"{k} loses no points"
        alike = {other: sum(grade.same_failure(w, values[other][w.check.says]) for w in wrong[k])
                 for other in mistakes}
        others = [other for other in mistakes if other != k and alike[other] >= alike[k]]
        assert alike[k] and not others, (k, alike)


@pytest.mark.course
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CODE)
def test_right_answers_written_otherwise_get_full_points(name, seed):
    item, grader = CODE[name], grade.Grader("", seed)
    bodies = source.read_toml(f"right/part{name[0]}.toml")[name]
    texts = {k: source.with_body(REFERENCE, item, body) for k, body in bodies.items()}
    wrong, _ = outcomes_of(grader, item, texts)
    for k in bodies:
        assert not wrong[k], (k, [grade.describe(w) for w in wrong[k]])


@pytest.mark.course
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_has_100_and_the_blank_handout_0(variant, tmp_path):
    whole = submission(tmp_path / "whole", source.reference(variant))
    results = grade.grade(whole, variant=variant, key=KEY)
    assert [r.output for r in results if r.score < r.points] == []
    assert sum(r.score for r in results) == 100 and "trained the toy" in results[-1].output
    blank = submission(tmp_path / "blank", make.blanked(variant),
                       (ROOT / "assignments/handout/my_reward.py").read_text(),
                       RIGHT_ANSWERS.replace('fault = "', 'fault = "" #'))
    results = grade.grade(blank, variant=variant, key=KEY)
    assert sum(r.score for r in results) == 0
    for r in results[:-1]:
        assert re.search(rf"part {r.name[:3]}", r.output), r


@pytest.mark.course
@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_the_published_answer_fails_in_a_variant(variant):
    changed = [name for name, item in CODE.items() if source.body(REFERENCE, item)
               != source.body(source.reference(variant), item)]
    results = grade_items(REFERENCE, *changed, variant=variant)
    assert changed and all(r.score < r.points for r in results.values())


@pytest.mark.course
@pytest.mark.parametrize("name", CODE)
def test_each_blank_alone_loses_exactly_its_own_points(name):
    results = grade_items(with_blank(name), *CODE)
    for other, r in results.items():
        assert r.score == (0 if other == name else r.points), (other, r.output)


# --- the handout and the zip -------------------------------------------------------------------

@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "handout"
    key = make.make_handout(out, debug_seed=3, steps=12)
    out.with_name("key.json").write_text(json.dumps(key))
    return out


def run_pytest(folder, *options):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *options], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.stdout[-3000:]


@pytest.mark.course
def test_the_handouts_own_tests_fail_blank_and_pass_solved(handout):
    key = json.loads(handout.with_name("key.json").read_text())
    assert re.search(r"\n[0-9]+ failed, \d+ deselected", run_pytest(handout, "-m", "part2"))
    (handout / "argrpo.py").write_text(REFERENCE)
    (handout / "my_reward.py").write_text(SOLUTION)
    make.make_solution(handout.with_name("right"), key)
    shutil.copy(handout.with_name("right") / "answers.toml", handout)
    output = run_pytest(handout)
    assert "passed" in output and "failed" not in output, output
    hint = subprocess.run([sys.executable, "hints.py", "2.1", "2"], cwd=handout, text=True,
                          capture_output=True)
    assert "token_logp, hint 2 of 2" in hint.stdout
    (handout / "argrpo.py").write_text(make.blanked())


@pytest.mark.course
def test_the_zip_runs_as_gradescope_runs_it(handout, tmp_path):
    make.make_gradescope(tmp_path / "grader.zip", handout.with_name("key.json"), seed=9)
    with zipfile.ZipFile(tmp_path / "grader.zip") as archive:
        archive.extractall(tmp_path / "autograder/source")
    submission(tmp_path / "autograder/submission", with_blank("2.4"), answers="")
    environment = {"PATH": os.environ["PATH"], "AUTOGRADER": str(tmp_path / "autograder"),
                   "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(tmp_path / "autograder/source/run_autograder")],
                          cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tests = json.loads((tmp_path / "autograder/results/results.json").read_text())["tests"]
    assert sum(test["max_score"] for test in tests) == 100
    assert sum(test["score"] for test in tests) == 100 - 3 - 12


# --- other systems -----------------------------------------------------------------------------

UNIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios",
                "tty"}
UNIX_NAMES = {"fork", "forkpty", "geteuid", "getgid", "getpgid", "getuid", "killpg", "mkfifo",
              "sched_getaffinity", "setpgid", "setsid", "statvfs", "sysconf", "uname", "wait",
              "wait4", "waitpid", "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGXCPU", "alarm",
              "setitimer"}


def test_the_handout_runs_on_macos_and_windows_too():
    """What students are given uses nothing that is of Unix, or of Linux, alone.  The grader does,
    and runs where the staff runs it."""
    given = [ROOT / name for name in (*make.GIVEN, "assignments/handout", "argrpo.py")]
    files = [file for path in given for file in ([path] if path.is_file() else path.rglob("*.py"))
             if file.suffix == ".py"]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = {getattr(node, "module", ""), getattr(node, "attr", "")}
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {alias.name for alias in node.names}
            bad = names & (UNIX_MODULES | UNIX_NAMES)
            if isinstance(node, ast.Constant) and re.match(r"/(dev|etc|proc|tmp|usr|var)/",
                                                           str(node.value)):
                bad.add(node.value)
            found += [f"{file.relative_to(ROOT)}:{node.lineno} {name}" for name in bad]
    assert len(files) > 15 and not found, f"only on Unix: {', '.join(found)}"
