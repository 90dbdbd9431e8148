"""WinQ and SQuAT under transformers' Trainer (``pip install qatkernels[hf]``).

    model = quantize_model(model, QuantConfig(bits=2), exclude="lm_head")
    winq = WinQCallback(reset_every=60_000, reset_weight=0.4, noise_std=1e-3)
    SQuATTrainer(model, args, train_dataset=data, callbacks=[winq], squat={"rho": 0.05}).train()

Each works without the other. Both start from the Trainer's global step, so a resumed run needs no state of theirs. Both
add their values to the Trainer's logs. The callback works in any Trainer, but it has two limits there: reporters that
come before it do not get its values, and it is not told when training fails. So use a :class:`QATTrainer` for WinQ
without SQuAT.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import missing

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise missing("qatkernels.integrations.transformers", "hf", error) from error

from ..methods.distillation import DistillationConfig, distillation_loss
from ..methods.squat import SQuAT
from ..methods.winq import WinQ
from ..nn import param_groups, quantized_modules, scales_at_floor
from ..nn.activation import scales_of
from ..nn.floor import floor_message
from .quantizer import QatConfig as QatConfig


class WinQCallback(TrainerCallback):
    """WinQ as a callback of any Trainer: noise in training, and resets after optimizer steps.

    In a Trainer that is not a :class:`QATTrainer`, the log history gets its values, but reporters such as TensorBoard's
    do not. If ``train()`` raises an error there, the noise stays on until you call ``callback.winq.remove()``.

    Args:
        **settings: arguments of :class:`~qatkernels.methods.WinQ` with the same defaults; steps are optimizer steps.
            ``two_sided``, and ``samples`` above 1, need a :class:`QATTrainer`, which makes the passes.
            ``reset_weight`` is the weight on the **quantized** value. The callback that the authors of the paper
            released takes the weight on the full-precision value, so its 0.2 is 0.8 here.

    Attributes:
        winq: the :class:`~qatkernels.methods.WinQ` of the current run, None before the first run.

    Raises:
        TypeError: if WinQ has no argument of a name, or an argument without a default is missing.
    """

    def __init__(self, **settings: Any) -> None:
        inspect.signature(WinQ).bind(None, **settings)  # raise for a wrong name here, not when training starts
        self.settings = settings
        self.winq: WinQ | None = None
        self.passes_taken = False  # a QATTrainer sets this: it makes the passes of a step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Turn the noise on. Raises the errors of WinQ."""
        winq = WinQ(model, **self.settings)
        if winq.passes > 1 and not self.passes_taken:
            winq.remove()
            raise ValueError(
                f"two_sided is {winq.two_sided} and samples {winq.samples}, must be False and 1 unless the Trainer is "
                "a QATTrainer"
            )
        self.winq = winq
        steps, every, last = state.global_step, self.winq.reset_every, self.winq.last_reset
        resets = min(steps, steps if last is None else last) // every if every else 0
        self.winq.load_state_dict({"steps": steps, "resets": resets})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reset if it is time, before a checkpoint of this step is written."""
        if self.winq is not None:
            self.winq.after_step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Add flips, distance to the grid and resets to a training log."""
        if logs is not None:
            state.log_history[-1].update(self.add_to(logs))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Turn the noise off."""
        if self.winq is not None:
            self.winq.remove()

    def add_to(self, logs: dict[str, float]) -> dict[str, float]:
        """Add WinQ's values to a training log, unless it has them, and return these values."""
        if self.winq is None or "loss" not in logs or "winq/flips" in logs:
            return {}
        values = self.winq.log()
        logs.update(values)
        return values


class QATTrainer(Trainer):
    """A Trainer for quantized models: scales have no weight decay, and a learning rate that fits their size.

    Training logs have ``scales_at_floor``, the number of scales at the smallest value, and the first time that it is
    not 0 there is a warning (:func:`qatkernels.scales_at_floor`). A :class:`WinQCallback` works fully: every reporter
    gets its values, an error turns its noise off, and a step averages over several passes.

    Args:
        *args: arguments of Trainer.
        scale_lr: learning rate of scales and zero points; None as for :func:`qatkernels.param_groups`. The Trainer's
            schedule applies to it. An optimizer that is given to the Trainer is not changed.
        teacher: a model that the training also learns from, such as ``copy.deepcopy(model)`` from before it was
            quantized (:func:`qatkernels.methods.distillation_loss`). It takes the same inputs. It is put into eval
            mode, frozen, and moved to the Trainer's device.
        distill: weight of learning from the teacher, in [0, 1]; the labels have the rest.
        temperature: divides both models' logits before the softmax.
        **kwargs: arguments of Trainer.

    Raises:
        ValueError: if ``distill`` or ``temperature`` is out of range.
    """

    def __init__(
        self,
        *args: Any,
        scale_lr: float | None = None,
        teacher: nn.Module | None = None,
        distill: float = 0.5,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.scale_lr = scale_lr
        self.distillation = DistillationConfig(distill, temperature)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self._warned_of_floor = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer, with separate parameter groups for scales."""
        is_given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = args[0] if args else kwargs.get("model") or self.model
        if not is_given and quantized_modules(model):
            self._separate_scales(optimizer, param_groups(model, lr=self.args.learning_rate, scale_lr=self.scale_lr))
        return optimizer

    @staticmethod
    def _separate_scales(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        """Move scales from the optimizer's groups into new groups, with their learning rates and no weight decay."""
        rates = {id(p): group["lr"] for group in groups if group["name"] == "scales" for p in group["params"]}
        for group in list(optimizer.param_groups):
            by_rate: dict[float, list[Tensor]] = {}
            for p in group["params"]:
                if id(p) in rates:
                    by_rate.setdefault(rates[id(p)], []).append(p)
            group["params"] = [p for p in group["params"] if id(p) not in rates]
            for rate, scales in by_rate.items():
                optimizer.add_param_group({**group, "params": scales, "lr": rate, "weight_decay": 0.0})

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that the Trainer decays, without scales and zero points of weights and activations."""
        scales = set(map(id, scales_of(model)))
        scale_names = {name for name, p in model.named_parameters() if id(p) in scales}
        return [name for name in super().get_decay_parameter_names(model) if name not in scale_names]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the Trainer's loss; in training with a teacher, its mean with the divergence from the teacher.

        Positions without a label (-100), such as padding, are left out of both.
        """
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)
        labels = batch.pop("labels", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        config = getattr(self.teacher, "config", None)
        with torch.no_grad():
            if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
                # Encoder-decoder models make the inputs of their decoder from the labels.
                target = _without_loss(self.teacher(**batch, labels=labels))
            else:
                target = self.teacher(**batch)
        logits = [out["logits"] if isinstance(out, dict) else out[0] for out in (_without_loss(outputs), target)]
        if labels is not None and labels.shape == logits[0].shape[:-1]:  # a label for each token
            if self._predicts_next(model):
                labels, logits = labels[:, 1:], [value[:, :-1] for value in logits]
            logits = [value[labels != -100] for value in logits]
        divergence = distillation_loss(logits[0], logits[1], self.distillation.temperature)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # The model divided the sum of its losses by the number of labels of all micro-batches and processes. The
            # Trainer multiplies by the number of processes, because it averages their gradients.
            divergence = divergence * (logits[0].shape[:-1].numel() / num_items_in_batch)
            if self.args.average_tokens_across_devices:
                divergence = divergence * self.accelerator.num_processes
        share = self.distillation.distill
        loss = (1 - share) * loss + share * divergence
        return (loss, outputs) if return_outputs else loss

    def _predicts_next(self, model: nn.Module) -> bool:
        """Whether a model compares its output at each token with the next label, as causal language models do."""
        plain: Any = self.accelerator.unwrap_model(model)
        if hasattr(plain, "get_base_model"):  # of PEFT
            plain = plain.get_base_model()
        return type(plain).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss: the mean over WinQ's passes."""

        def closure() -> Tensor:
            # A copy for each pass, because computing the loss may remove the labels from the batch.
            loss: Tensor = super(QATTrainer, self).training_step(model, copy.copy(inputs), *args, **kwargs)
            return loss

        winq = next((c.winq for c in self._winq() if c.winq is not None and c.winq.passes > 1), None)
        if winq is None:
            return closure()
        winq.model = model  # the Trainer has wrapped the model since on_train_begin
        loss: Tensor = winq.gradient(closure, accumulate=True)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; arguments and result are those of ``Trainer.train``."""
        for callback in self._winq():
            callback.passes_taken = True
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self._winq():
                callback.on_train_end()
                callback.passes_taken = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add WinQ's values and ``scales_at_floor`` to a training log, before any callback gets it."""
        for callback in self._winq():
            callback.add_to(logs)
        model: Any = self.model
        if "loss" in logs and quantized_modules(model):
            count = sum(scales_at_floor(model).values())
            logs["scales_at_floor"] = float(count)
            if count and not self._warned_of_floor:
                self._warned_of_floor = True
                total = sum(scale.numel() for scale in scales_of(model))
                warnings.warn(f"{floor_message(count, total)}, or a smaller scale_lr of the Trainer", stacklevel=2)
        super().log(logs, *args, **kwargs)

    def _winq(self) -> list[WinQCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, WinQCallback)]


def _without_loss(outputs: Any) -> Any:
    """Return a model's outputs without the loss, which is the first of a tuple."""
    return outputs if isinstance(outputs, dict) else outputs[1:]


class _AfterStep(TrainerCallback):
    """Makes a new SQuAT for each training, and counts its steps."""

    def __init__(self, trainer: SQuATTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.squat = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.trainer.squat is not None:
            self.trainer.squat.after_step()


class SQuATTrainer(QATTrainer):
    """A Trainer that trains with SQuAT: two passes a step, one of them at perturbed weights.

    With ``gradient_accumulation_steps`` each micro-batch is perturbed along its own gradient, and all micro-batches of
    a step have the same objective. Several processes average the gradients of each micro-batch.

    Args:
        *args: arguments of Trainer.
        squat: keyword arguments of :class:`~qatkernels.methods.SQuAT`.
        **kwargs: arguments of Trainer.

    Attributes:
        squat: the SQuAT of the model being trained, None before the first step.
    """

    def __init__(self, *args: Any, squat: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = dict(squat or {})
        self.squat: SQuAT | None = None
        self.add_callback(_AfterStep(self))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients of SQuAT, and return the loss at the quantized weights."""
        if self.squat is None:
            self.squat = SQuAT(model, **self._settings)
            self.squat.load_state_dict({"steps": self.state.global_step})

        def closure() -> Tensor:
            return super(SQuATTrainer, self).training_step(model, inputs, *args, **kwargs)

        loss: Tensor = self.squat.gradient(closure, accumulate=True)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add SQuAT's values to a training log."""
        if self.squat is not None and "loss" in logs:
            logs.update(self.squat.log())
        super().log(logs, *args, **kwargs)
