"""Real Trainers on a tiny model."""

import copy
from itertools import pairwise

import pytest
import torch

from qatkernels.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from qatkernels import QuantConfig, param_groups, quantize_model, quantized_modules  # noqa: E402
from qatkernels.integrations.transformers import QATTrainer, SQuATTrainer, WinQCallback  # noqa: E402
from qatkernels.methods import SQuAT, WinQ, distillation_loss, hadamard  # noqa: E402

STEPS = 6


def make_model(bits=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return quantize_model(transformers.LlamaForCausalLM(config), QuantConfig(bits=bits), exclude="lm_head")


def dataset(size=8):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32, (size, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, **kwargs):
    defaults = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "save_strategy": "no", "learning_rate": 3e-3, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0, "seed": 3,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **kwargs})


def train(trainer_class, model, folder, callbacks=(), extra=None, resume=None, **kwargs):
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=dataset(),
        callbacks=list(callbacks),
        **(extra or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def own_loop(step, trainer=QATTrainer):
    """The loop that the Trainer runs on one batch over and over, by hand."""
    model = make_model().train()
    parameters = param_groups(model, lr=3e-3) if issubclass(trainer, QATTrainer) else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    batch = {key: torch.stack([row[key] for row in dataset()]) for key in ("input_ids", "labels")}

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    run = step(model, optimizer)
    for _ in range(STEPS):
        run(closure)
    return model


def assert_close(model, other):
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_winq_callback(tmp_path):
    settings = {"reset_every": 2, "reset_weight": 0.5, "noise_std": 0.0}
    callback, model = WinQCallback(**settings), make_model()
    trainer = train(transformers.Trainer, model, tmp_path, [callback])
    assert callback.winq.steps == STEPS
    assert callback.winq.resets == 3

    def step(model, optimizer):
        winq = WinQ(model, **settings)
        return lambda closure: (closure(), optimizer.step(), winq.after_step())

    assert_close(model, own_loop(step, transformers.Trainer))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    assert all(0 <= entry["winq/flips"] < 1 and entry["winq/distance"] > 0 for entry in logs)
    assert any(entry["winq/flips"] > 0 for entry in logs)
    assert logs[-1]["winq/resets"] == 3


@pytest.mark.parametrize("several", [{"two_sided": True}, {"samples": 2}])
def test_several_passes(tmp_path, several):
    """QATTrainer takes WinQ's passes; another Trainer would take one."""
    settings = {"reset_every": None, "reset_weight": 0.0, "noise_std": 0.0, **several}
    callback, model = WinQCallback(**settings), make_model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    train(QATTrainer, model, tmp_path, [callback])
    assert len(calls) == 2 * STEPS
    assert_close(model, own_loop(lambda model, optimizer: lambda closure: (closure(), optimizer.step())))
    for one in (WinQCallback(**settings), callback):
        with pytest.raises(ValueError, match="must be False and 1 unless the Trainer is a QATTrainer"):
            train(transformers.Trainer, make_model(), tmp_path, [one])


def layer(model):
    return next(iter(quantized_modules(model).values()))


@pytest.mark.parametrize("scale_lr", [None, 1e-6])
def test_scales_have_their_own_learning_rate(tmp_path, scale_lr):
    model = make_model()
    trainer = QATTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset(), scale_lr=scale_lr)
    trainer.create_optimizer()
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert set(rates) == {id(p) for p in model.parameters()}
    wanted = {id(p): g["lr"] for g in param_groups(model, lr=3e-3, scale_lr=scale_lr) for p in g["params"]}
    assert rates == wanted
    before = rates[id(layer(model).scale)]
    assert before == 1e-6 if scale_lr else before < 3e-3
    trainer.train()
    assert "scales_at_floor" in trainer.state.log_history[0]


def test_a_given_optimizer_stays_as_it_is(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = QATTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset(), optimizers=(optimizer, None))
    trainer.create_optimizer()
    assert len(optimizer.param_groups) == 1


def test_scales_at_the_floor_are_warned_of_once(tmp_path):
    model = make_model()
    with torch.no_grad():
        layer(model).scale[:2] = -1.0
    trainer = QATTrainer(
        model=model, args=arguments(tmp_path, max_steps=3), train_dataset=dataset(), scale_lr=0.0
    )  # fmt: skip
    with pytest.warns(UserWarning, match="2 of .* scales have fallen") as caught:
        trainer.train()
    assert len([w for w in caught if "a smaller scale_lr of the Trainer" in str(w.message)]) == 1
    assert {e["scales_at_floor"] for e in trainer.state.log_history if "loss" in e} == {2.0}


def test_scales_are_not_decayed(tmp_path):
    model = make_model()
    trainer = QATTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1), train_dataset=dataset())
    trainer.create_optimizer()
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any(name.endswith("scale") for name in names)


def test_sharpness_does_not_depend_on_accumulation(tmp_path):
    found = []
    for parts in (1, 4):
        args = arguments(
            tmp_path, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, max_steps=1
        )
        trainer = SQuATTrainer(model=make_model(), args=args, train_dataset=dataset(1) * 8)
        trainer.train()
        found += [entry["squat/sharpness"] for entry in trainer.state.log_history if "squat/sharpness" in entry]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


class Reporter(transformers.TrainerCallback):
    """A callback that is called before the others, as integrations such as TensorBoard's are."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("trainer_class", [QATTrainer, SQuATTrainer])
def test_reporters_get_the_numbers_of_winq(tmp_path, trainer_class):
    reporter = Reporter()
    callback = WinQCallback(reset_every=2, reset_weight=0.5, noise_std=1e-3)
    trainer = train(trainer_class, make_model(), tmp_path, [reporter, callback])
    seen = [logs for logs in reporter.seen if "loss" in logs]
    assert len(seen) == STEPS
    assert all({"winq/flips", "winq/distance", "winq/resets"} <= set(logs) for logs in seen)
    assert any(logs["winq/flips"] > 0 for logs in seen)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["winq/flips"] for entry in history] == [logs["winq/flips"] for logs in seen]


def test_an_error_turns_the_noise_off(tmp_path):
    class Breaks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("planned")

    model, callback = make_model(), WinQCallback(reset_every=None, reset_weight=0.0, noise_std=1e-3)
    with pytest.raises(RuntimeError, match="planned"):
        train(QATTrainer, model, tmp_path, [callback, Breaks()])
    assert all(
        layer.quantizer.noise_std == layer.quantizer.scale_noise_std == 0 for layer in quantized_modules(model).values()
    )


def test_last_reset_and_rotation(tmp_path):
    """There is no reset after the last one, also in a resumed run. The rotation is WinQ's."""
    settings = {"reset_every": 2, "reset_weight": 0.5, "noise_std": 0.0, "last_reset": 2}
    callback = WinQCallback(**settings, rotation=hadamard)
    train(QATTrainer, make_model(), tmp_path, [callback], save_strategy="steps", save_steps=4)
    assert (callback.winq.resets, callback.winq.rotation) == (1, hadamard)
    again = WinQCallback(**settings)
    train(QATTrainer, make_model(), tmp_path, [again], resume=str(tmp_path / "checkpoint-4"))
    assert (again.winq.steps, again.winq.resets) == (STEPS, 1)


def test_noise_is_on_in_training_and_off_after(tmp_path):
    seen = []
    model = make_model()
    layer = next(iter(quantized_modules(model).values()))
    layer.register_forward_hook(lambda module, *_: seen.append((module.training, module.quantizer.noise_std)))
    train(transformers.Trainer, model, tmp_path, [WinQCallback(reset_every=None, reset_weight=0.0, noise_std=1e-3)])
    assert seen == [(True, 1e-3)] * STEPS
    assert layer.quantizer.noise_std == 0


def test_a_resumed_winq_run_is_the_same(tmp_path):
    settings = {"reset_every": 4, "reset_weight": 0.5, "noise_std": 1e-3}
    whole, part = make_model(), make_model()
    callback = WinQCallback(**settings)
    train(transformers.Trainer, whole, tmp_path / "whole", [WinQCallback(**settings)])
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(transformers.Trainer, part, tmp_path / "part", [WinQCallback(**settings)], **saving)
    again = make_model()
    checkpoint = str(tmp_path / "part/checkpoint-3")
    train(transformers.Trainer, again, tmp_path / "part", [callback], resume=checkpoint, **saving)
    assert (callback.winq.steps, callback.winq.resets) == (STEPS, 1)
    for name, value in whole.state_dict().items():
        assert_same_bits(part.state_dict()[name], value, name)
        assert_same_bits(again.state_dict()[name], value, name)


@pytest.mark.parametrize("settings", [{}, {"target": "latent", "norm": "asam", "rho": 0.5}, {"minibatch": "next"}])
def test_squat_trainer(tmp_path, settings):
    model = make_model()
    trainer = train(SQuATTrainer, model, tmp_path, extra={"squat": settings})
    assert_close(model, own_loop(lambda model, optimizer: SQuAT(model, optimizer, **settings).step))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    assert all({"squat/sharpness", "squat/perturbation_norm", "squat/flips"} <= set(entry) for entry in logs)
    assert any(entry["squat/flips"] > 0 for entry in logs)


def test_accumulation_and_clipping(tmp_path):
    """Micro-batches of a step serve one objective; with `next` the weights stay in every other step."""
    model, seen = make_model(), []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    kwargs = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    train(SQuATTrainer, model, tmp_path, [Watch()], {"squat": {"minibatch": "next"}}, **kwargs)
    assert len(seen) == STEPS
    for step, (before, after) in enumerate(pairwise(seen), start=1):
        for name, value in after.items():
            is_scale = name.endswith(".scale")
            assert torch.equal(before[name], value) != (is_scale == (step % 2 == 1)), (step, name)


def replica(rank, folder, trainer):
    """Train one of two replicas; the Trainer accumulates within DDP's no_sync."""
    model = make_model()
    callback = WinQCallback(reset_every=None, reset_weight=0.0, noise_std=1e-3, two_sided=trainer is QATTrainer)
    kwargs = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    made = train(trainer, model, folder, [callback], **kwargs)
    assert made.args.world_size == 2
    assert isinstance(made.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("trainer", [QATTrainer, SQuATTrainer])
def test_replicas_of_two_processes_stay_the_same(pair, tmp_path, trainer):
    replicas = pair.run(replica, tmp_path, trainer)
    for first, second in zip(*replicas, strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("bits", [2, 4], ids=["SEQ", "LSQ"])
def test_both_at_once(tmp_path, bits):
    callback, model = WinQCallback(reset_every=2, reset_weight=0.5, noise_std=1e-3), make_model(bits)
    trainer = train(SQuATTrainer, model, tmp_path, [callback], {"squat": {"target": "latent"}}, bf16=True)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"winq/resets", "winq/flips", "squat/sharpness", "squat/distance"} <= set(last)
    assert callback.winq.resets == 3
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reset_every": 2, "reset_weight": 0.5, "noise_std": 0.0, "reset_period": 3}, "'reset_period'"),
        ({"reset_every": 2, "reset_weight": 0.5}, "missing a required .*argument: 'noise_std'"),
    ],
)
def test_settings_that_winq_does_not_have(settings, message):
    with pytest.raises(TypeError, match=message):
        WinQCallback(**settings)


def test_an_unquantized_model_is_refused(tmp_path):
    callback = WinQCallback(reset_every=2, reset_weight=0.5, noise_std=1e-3)
    with pytest.raises(ValueError, match="no quantized layer"):
        train(transformers.Trainer, transformers.LlamaForCausalLM(make_model().config), tmp_path, [callback])


def padded(size=8):
    """Sequences of 3 to 12 tokens, padded on the right."""
    rows = []
    for i, row in enumerate(dataset(size)):
        kept = torch.arange(12) < 3 + (5 * i) % 10
        labels = torch.where(kept, row["labels"], -100)
        rows.append({"input_ids": row["input_ids"], "attention_mask": kept.long(), "labels": labels})
    return rows


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_distillation(tmp_path, share):
    """A Trainer with a teacher takes the steps of a loop, whose loss leaves out padding."""
    teacher = make_model(8)
    train(QATTrainer, teacher, tmp_path / "teacher")
    extra = {"teacher": teacher, "distill": share, "temperature": 2.0}
    trainer = QATTrainer(model=make_model(), args=arguments(tmp_path), train_dataset=padded(), **extra)
    trainer.train()
    assert not any(p.requires_grad for p in teacher.parameters())

    def step(model, optimizer):
        batch = {key: torch.stack([row[key] for row in padded()]) for key in padded()[0]}
        labels = batch["labels"][:, 1:]

        def run(_):
            optimizer.zero_grad()
            logits = model(**batch).logits[:, :-1][labels != -100]
            target = teacher(**batch).logits[:, :-1][labels != -100]
            entropy = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
            loss = (1 - share) * entropy + share * distillation_loss(logits, target, 2.0)
            loss.backward()
            optimizer.step()

        return run

    assert_close(trainer.model, own_loop(step))


def test_distillation_in_micro_batches(tmp_path):
    """Their lengths differ, and the sum of their gradients is that of the whole batch."""
    models = []
    for accumulate in (1, 4):
        size = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
        extra = {"teacher": make_model(8), "distill": 0.7}
        trainer = QATTrainer(model=make_model(), args=arguments(tmp_path, **size), train_dataset=padded(), **extra)
        trainer.train()
        models.append(trainer.model)
    assert_close(*models)


def test_distillation_of_a_classifier(tmp_path):
    """Which has one label for a sequence, and is evaluated on the labels alone."""
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": row["input_ids"], "labels": int(row["input_ids"][0]) % 3} for row in dataset()]
    teacher = copy.deepcopy(model)
    trainer = QATTrainer(
        model=quantize_model(model, QuantConfig(2), warn_below=0), teacher=teacher, distill=1.0, train_dataset=rows,
        eval_dataset=rows, args=arguments(tmp_path),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        batch = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
        labels = torch.tensor([row["labels"] for row in rows])
        assert before == pytest.approx(float(model.eval()(**batch, labels=labels).loss), rel=1e-4)
        first = distillation_loss(model(**batch).logits, teacher(**batch).logits)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[0] == pytest.approx(float(first), rel=1e-3)
    assert history[-1] < history[0]


def test_a_share_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"distill is 1\.5, must be"):
        QATTrainer(model=make_model(), args=arguments(tmp_path), teacher=make_model(8), distill=1.5)


def test_micro_batches_without_labels(tmp_path):
    """Such as prompts that were cut off: they add nothing to the loss."""
    none = torch.full((12,), -100)
    rows = [{**row, "labels": none} if i % 2 else row for i, row in enumerate(dataset())]
    losses = []
    for size in (8, 1):
        extra = {"teacher": make_model(8), "distill": 0.5}
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = QATTrainer(model=make_model(), args=arguments(tmp_path, **split), train_dataset=rows, **extra)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_distillation_of_an_encoder_and_a_decoder(tmp_path):
    """The model and the teacher make the inputs of their decoders from the labels."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    teacher = copy.deepcopy(model)
    quantize_model(model, QuantConfig(2), warn_below=0)
    batch = {key: torch.stack([row[key] for row in dataset()]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        wanted = distillation_loss(model(**batch).logits, teacher(**batch).logits)
    extra = {"teacher": teacher, "distill": 1.0, "train_dataset": dataset()}
    trainer = QATTrainer(model=model, args=arguments(tmp_path, max_steps=1), **extra)
    assert trainer.train().training_loss == pytest.approx(float(wanted), rel=1e-4)
