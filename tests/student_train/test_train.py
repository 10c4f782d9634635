"""The training loop: normalisation, schedules, resume, refusals, what it saves."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from decant.schemas import FormatError
from decant.storage import CacheReader
from decant.student_train import (
    CacheShare,
    CacheStream,
    Distiller,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.loop import NotFinite
from decant.student_train.model.student import load_student
from decant.student_train.outputs.resuming import config_record, refuse_other_config
from decant.student_train.runtime.optimizer import learning_rate
from tests.support.trainings import STUDENT, config, losses, weights


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates(schedule: str) -> None:
    """Warmup rises to the peak; decays end at the floor; constant stays."""
    options = OptimizerConfig(
        lr=1.0,
        schedule=schedule,
        warmup_steps=4,
        min_lr_ratio=0.0 if schedule == "constant" else 0.1,
    )
    rates = [learning_rate(options, step, 105) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    middle, end = {"cosine": (0.55, 0.1), "linear": (0.55, 0.1), "constant": (1, 1)}[schedule]
    assert rates[54] == pytest.approx(middle)
    assert rates[104] == pytest.approx(end)
    assert min(rates[3:]) == rates[104]


def test_a_warmup_may_be_a_share_of_the_run() -> None:
    """It is the warmup of as many steps, at least one; both together are refused."""
    share, steps = OptimizerConfig(warmup_ratio=0.03), OptimizerConfig(warmup_steps=4)
    rates = [learning_rate(share, step, 104) for step in range(104)]
    assert rates == [learning_rate(steps, step, 104) for step in range(104)]
    short = OptimizerConfig(warmup_ratio=0.03, schedule="constant")
    assert [learning_rate(short, step, 5) for step in range(5)] == [short.lr] * 5
    with pytest.raises(ValueError, match=r"warmup_steps or warmup_ratio: found 4 and 0\.03"):
        OptimizerConfig(warmup_steps=4, warmup_ratio=0.03)


def test_a_checkpoint_may_be_older_than_an_option() -> None:
    """An option it does not know counts as what it was before, and only that."""
    ours = config_record(
        TrainConfig(cache="c", output="o", student=StudentConfig(path="s"), steps=1)
    )
    theirs = json.loads(json.dumps(ours))
    del theirs["optimizer"]["betas"], theirs["loss"]["tail"]
    refuse_other_config(theirs, ours, "step-1")
    ours["loss"]["tail"] = "uniform"
    with pytest.raises(ValueError, match=r"loss\.tail: was 'bucket', this run gives 'uniform'"):
        refuse_other_config(theirs, ours, "step-1")


def test_microbatches_count_by_targets(cache: Path, tmp_path: Path) -> None:
    """4 x 2 sequences with ragged target counts train exactly like one batch of 8."""
    train(config(cache, tmp_path / "one", batch_size=8))
    train(config(cache, tmp_path / "four", batch_size=2, gradient_accumulation=4))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "four"), rel=1e-4)


def test_an_interrupted_run_resumes_to_the_same_weights(cache: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle, then a rerun: bit-equal weights and the same metrics lines."""
    train(config(cache, tmp_path / "whole", steps=40))
    part = config(cache, tmp_path / "part", steps=40)
    metrics = tmp_path / "part" / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train(part)
    thread.join()
    assert 0 < len(losses(tmp_path / "part")) < 40
    train(part)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    theirs = weights(tmp_path / "whole")
    for name, value in weights(tmp_path / "part").items():
        assert torch.equal(value, theirs[name]), name


def test_a_rerun_of_a_finished_run_changes_nothing(cache: Path, tmp_path: Path) -> None:
    """It returns the same summary; with another config it refuses and names the field."""
    done = config(cache, tmp_path / "run", steps=2)
    summary = train(done)
    before = (tmp_path / "run/student/model.safetensors").read_bytes()
    assert train(done) == summary
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="seed: was 0, this run gives 3"):
        train(dataclasses.replace(done, seed=3))


def test_what_another_trainer_has_left_changes_nothing(cache: Path, tmp_path: Path) -> None:
    """One that stopped within a step leaves accelerate's optimizers of the process waiting."""
    train(config(cache, tmp_path / "alone"))
    GradientState()._set_sync_gradients(False)
    train(config(cache, tmp_path / "after"))
    alone, after = (weights(tmp_path / name) for name in ("alone", "after"))
    assert all((alone[name] == after[name]).all() for name in alone)


def test_a_checkpoint_of_another_config_is_refused(cache: Path, tmp_path: Path) -> None:
    """The message names what differs, and nothing is overwritten."""
    first = config(cache, tmp_path / "run", steps=4, save_every_steps=2)
    train(first)
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(ValueError, match="seed: was 0, this run gives 1"):
        train(dataclasses.replace(first, seed=1))


def test_the_saved_student_loads_and_scores_as_reported(
    cache: Path, teacher_path: Path, tmp_path: Path
) -> None:
    """`from_pretrained` gives the evaluated student, with the reported cross-entropy."""
    summary = train(config(cache, tmp_path / "run", eval=EvalConfig(heldout_fraction=0.2)))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/student")
    teacher_tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    assert tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    stream = CacheStream(cache, batch_size=1, part="heldout", heldout_fraction=0.2)
    total, count = 0.0, 0
    batches = iter(stream)
    for _ in range(stream.num_sequences):
        batch = next(batches)
        with torch.no_grad():
            logits = student(batch.input_ids).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits[batch.predictors], batch.labels, reduction="sum"
        )
        total, count = total + loss.item(), count + batch.num_targets
    assert summary["heldout_ce"] == pytest.approx(total / count, rel=1e-5)
    assert summary["peak_memory_mb"] > 0


def test_a_student_with_another_tokenizer_is_refused(
    cache: Path, other_teacher_path: Path, tmp_path: Path
) -> None:
    """The message shows the first differing tokens."""
    student = StudentConfig(path=str(other_teacher_path))
    with pytest.raises(FormatError, match=r"another tokenizer.*ids differ, first"):
        train(config(cache, tmp_path / "run", student=student))


def test_a_student_with_too_small_a_vocabulary_is_refused(cache: Path, tmp_path: Path) -> None:
    """Fewer output rows than shared ids cannot be trained."""
    student = StudentConfig(config={**STUDENT, "vocab_size": 64})
    with pytest.raises(ValueError, match="64 output rows"):
        train(config(cache, tmp_path / "run", student=student))


def test_padding_rows_of_the_student_get_no_probability_and_no_gradient(
    cache: Path, tmp_path: Path
) -> None:
    """A head larger than the shared vocabulary trains as if it were cut."""
    shared = CacheStream(cache, batch_size=1).reader.manifest.shared_vocab_size
    student = AutoModelForCausalLM.from_pretrained(
        _saved(tmp_path, {**STUDENT, "vocab_size": shared + 7, "tie_word_embeddings": False})
    )
    model = Distiller(student, LossConfig(kind="rkl", ce_weight=1.0), shared)
    model(next(iter(CacheStream(cache, batch_size=2)))).loss.backward()
    gradient = student.get_output_embeddings().weight.grad
    assert gradient[shared:].abs().max() == 0
    assert gradient[:shared].abs().max() > 0


@pytest.mark.parametrize("kind", ["fkl", "rkl", "akl"])
def test_the_fused_head_and_the_models_own_logits_agree(cache: Path, kind: str) -> None:
    """Loss and gradients do not depend on the route that the check chose."""
    from transformers import AutoConfig

    batch = next(iter(CacheStream(cache, batch_size=3, temperature=2.0)))
    shared = CacheStream(cache, batch_size=1).reader.manifest.shared_vocab_size
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        settings = AutoConfig.for_model(**{**STUDENT, "vocab_size": shared})
        model = Distiller(
            AutoModelForCausalLM.from_config(settings),
            LossConfig(kind=kind, ce_weight=0.5, temperature=2.0),
            shared,
        )
        assert model.head is not None
        if not fused:
            model.head = None
        out = model(batch)
        out.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((out.loss.item(), gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_not_a_number_stops_and_names_the_samples(
    cache: Path, tmp_path: Path
) -> None:
    """Nothing is saved as the student."""
    path = _saved(tmp_path, {**STUDENT, "vocab_size": 512})
    student = AutoModelForCausalLM.from_pretrained(path)
    student.model.norm.weight.data[0] = float("nan")
    student.save_pretrained(path)
    _tokenizer_of(cache, path)
    with pytest.raises(NotFinite, match="; samples: text-"):
        train(config(cache, tmp_path / "run", student=StudentConfig(path=str(path))))
    assert not (tmp_path / "run/student").exists()


def test_a_tracker_that_is_not_installed_is_refused(cache: Path, tmp_path: Path) -> None:
    """Silently tracking nothing would be found out after the run."""
    with pytest.raises(ValueError, match="not installed"):
        train(config(cache, tmp_path / "run", trackers=["comet_ml"]))


def test_a_precision_that_the_launcher_sets_otherwise_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate's config asks for would have no effect."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="launched with mixed_precision bf16, this config has no"):
        train(config(cache, tmp_path / "run"))


def test_processes_that_know_nothing_of_each_other_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a config for GPUs launches where there is none: each would train everything."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched.*--cpu"):
        train(config(cache, tmp_path / "run"))


@pytest.mark.parametrize("change", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_options_that_save_memory_keep_the_loss(cache: Path, tmp_path: Path, change: dict) -> None:
    """bf16 follows the float32 curve closely, activation checkpointing exactly."""
    train(config(cache, tmp_path / "plain"))
    AcceleratorState._reset_state()  # one process has one precision otherwise
    train(config(cache, tmp_path / "changed", **change))
    AcceleratorState._reset_state()
    tolerance = 2e-2 if "mixed_precision" in change else 1e-6
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


def test_bad_configs_are_refused(cache: Path, tmp_path: Path) -> None:
    """Options that exclude each other or have no effect are errors."""
    with pytest.raises(ValueError, match="give steps or epochs"):
        config(cache, tmp_path, epochs=1.0)
    with pytest.raises(ValueError, match="one of path, config and from_teacher"):
        StudentConfig()
    with pytest.raises(ValueError, match="not one of"):
        LossConfig(kind="kl")
    with pytest.raises(ValueError, match="exclude each other"):
        EvalConfig(cache="x", heldout_fraction=0.1)
    with pytest.raises(ValueError, match="no effect with schedule constant"):
        OptimizerConfig(schedule="constant", min_lr_ratio=0.1)
    with pytest.raises(ValueError, match="weight_decay"):
        OptimizerConfig(weight_decay=-0.1)
    with pytest.raises(ValueError, match="warmup_steps 7 is more than the run's 6 steps"):
        config(cache, tmp_path, optimizer=OptimizerConfig(warmup_steps=7))
    with pytest.raises(ValueError, match="local directory; copy or push afterwards"):
        dataclasses.replace(config(cache, tmp_path), output="s3://bucket/run")


def test_evaluation_on_what_is_trained_on_is_refused(cache: Path, tmp_path: Path) -> None:
    """Even by another path, and as one of a mixture."""
    (tmp_path / "alias").symlink_to(cache)
    run = config(cache, tmp_path / "run", eval=EvalConfig(cache=str(tmp_path / "alias")))
    mixture = [CacheShare(cache=str(cache), weight=1.0)]
    for changed in (run, dataclasses.replace(run, cache="", mixture=mixture)):
        with pytest.raises(ValueError, match=r"is trained on.*eval\.heldout_fraction"):
            train(changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 32}, r"no field 'hiden_size', did you mean 'hidden_size'\?"),
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "big"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "does not give a model"),
    ],
)
def test_a_student_config_that_gives_no_model_is_refused(
    cache: Path, tmp_path: Path, fields: dict, message: str
) -> None:
    """As a ValueError that says why, whatever transformers raises; also from a file."""
    reader = CacheReader(cache)
    with pytest.raises(ValueError, match=message):
        load_student(StudentConfig(config=STUDENT | fields), reader, 0)
    (tmp_path / "config.json").write_text(json.dumps(STUDENT | {"hidden_size": 33}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_student(StudentConfig(path=str(tmp_path)), reader, 0)


def test_other_names_of_a_student_config_are_taken(cache: Path) -> None:
    """Those that transformers maps to a field, and the older ones of rotary positions."""
    older = StudentConfig(config=STUDENT | {"rope_theta": 5000.0})
    student, _ = load_student(older, CacheReader(cache), 0)
    assert student.config.rope_parameters["rope_theta"] == 5000.0
    mapped = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "n_head": 2}
    student, _ = load_student(StudentConfig(config=mapped), CacheReader(cache), 0)
    assert student.config.n_embd == 32


def test_a_student_that_is_an_adapter_alone_is_refused(cache: Path, tmp_path: Path) -> None:
    """Its base would be loaded, and the adapter be trained or lost."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter alone: merge it"):
        load_student(StudentConfig(path=str(tmp_path)), CacheReader(cache), 0)


def test_a_student_that_sees_later_tokens_is_refused() -> None:
    """BERT as an encoder sees the token that it is asked for; as a decoder it does not."""
    fields = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    for is_decoder in (False, True):
        settings = AutoConfig.for_model(
            "bert", num_attention_heads=2, is_decoder=is_decoder, **fields
        )
        student = AutoModelForCausalLM.from_config(settings)
        if is_decoder:
            Distiller(student, LossConfig(), 40)
        else:
            with pytest.raises(ValueError, match=r"sees later tokens.*is_decoder: true"):
                Distiller(student, LossConfig(), 40)


def _saved(tmp_path: Path, fields: dict) -> Path:
    path = tmp_path / "pretrained"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(path)
    return path


def _tokenizer_of(cache: Path, target: Path) -> None:
    for file in (cache / "tokenizer").iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_a_run_that_fails_behind_its_last_step_repeats_none(cache: Path, tmp_path: Path) -> None:
    """What the last steps learned is kept until the student is saved, and only until then."""
    run = config(cache, tmp_path / "run", eval=EvalConfig(heldout_fraction=0.3))
    blocked = tmp_path / "run/.student.tmp"
    blocked.parent.mkdir()
    blocked.write_text("in the way of the student's files")
    with pytest.raises(OSError, match="student"):
        train(run)
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir()
    before = losses(tmp_path / "run")
    blocked.unlink()
    assert train(run)["steps"] == 6
    assert losses(tmp_path / "run") == before
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_an_output_that_is_somebody_elses_is_refused(cache: Path, tmp_path: Path) -> None:
    """A file; a folder that holds a student from elsewhere, which stays as it is."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a directory"):
        train(config(cache, tmp_path / "file"))
    (tmp_path / "mine/student").mkdir(parents=True)
    (tmp_path / "mine/student/notes").write_text("precious")
    with pytest.raises(ValueError, match="not written by a training"):
        train(config(cache, tmp_path / "mine"))
    pretrained = StudentConfig(path=str(tmp_path / "mine/student"))
    with pytest.raises(ValueError, match=r"would replace student\.path"):
        train(config(cache, tmp_path / "mine", student=pretrained))
    assert (tmp_path / "mine/student/notes").read_text() == "precious"


@pytest.mark.parametrize("place", ["", "student-of-it", "shards/deeper"])
def test_an_output_in_a_cache_is_refused(cache: Path, tmp_path: Path, place: str) -> None:
    """Any cache, also one that is not trained on: it holds nothing but itself."""
    (tmp_path / "other/shards").mkdir(parents=True)
    (tmp_path / "other/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is in the cache .*other, which holds nothing but"):
        train(config(cache, tmp_path / "other" / place))
    assert sorted(p.name for p in (tmp_path / "other").rglob("*")) == ["manifest.json", "shards"]


def test_a_warmup_that_epochs_do_not_reach_is_refused(cache: Path, tmp_path: Path) -> None:
    """As soon as the number of steps is known, before the first."""
    run = dataclasses.replace(config(cache, tmp_path / "run"), steps=0, epochs=1.0)
    with pytest.raises(ValueError, match=r"warmup_steps 1000 is more than the run's \d+ steps"):
        train(dataclasses.replace(run, optimizer=OptimizerConfig(warmup_steps=1000)))
    assert not (tmp_path / "run/metrics.jsonl").exists()
