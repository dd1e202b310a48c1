"""ZOMixin: a trainer's documented hooks, overridden so that a step is forward passes only.

transformers.Trainer's loop calls `training_step` for each micro-batch, then `optimizer.step()`. Here a micro-batch is
kept until its batch is whole; then the optimizer asks for the loss of the whole batch at several points (`ZO.query`),
and the loop's own `optimizer.step()` applies what was estimated. So callbacks, schedulers, logs, evaluation,
checkpoints and everything else of the loop stay as they are.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.ledger import Ledger, weights_hash
from zotune.errors import ConfigError
from zotune.hf.arguments import ZOArguments, settle_arguments, transformers
from zotune.hf.batch import MicroBatch, WholeBatch
from zotune.hf.building import build_optimizer, complete, describe_base, unwrapped
from zotune.hf.card import complete_card
from zotune.hf.ledgers import begin, go_back, lay_beside, ledger_path, read_record
from zotune.hf.record import make_record, numbers_to_log
from zotune.hf.refusals import (
    refuse_data_parallel,
    refuse_first_order,
    refuse_folding,
    refuse_half_a_checkpoint,
    refuse_sharding,
)
from zotune.hf.settings import ZOSettings
from zotune.optim.optimizer import ZO

GIVEN = {"lr": "learning_rate", "eps": "eps"}  # options of ZO, and the names of their sources


class ZOMixin:
    """Makes a trainer forward-only: `class ZORewardTrainer(ZOMixin, trl.RewardTrainer)`.

    `arguments` names the class of settings that goes with it: a dataclass of (ZOSettings, the trainer's own config);
    other TrainingArguments are turned into it. `smooth = False` says that the loss jumps (a count, a reward of text), so
    that the engine does not compare losses of two ways of asking.
    """

    arguments: ClassVar[type[ZOSettings]] = ZOArguments
    smooth: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what the trainer takes.

        Raises:
            ConfigError: settings that a forward-only run cannot honour, or an optimizer that needs gradients.
        """
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        settings = settle_arguments(bound.arguments.get("args"), self.arguments)
        refuse_first_order(settings)  # again: attributes may have been set since it was made
        bound.arguments["args"] = settings
        self.best_is_back = False  # load_best_model_at_end put back weights that are not the optimizer's last
        self._micro: list[MicroBatch] = []
        self._step_forwards = 0  # queries of the last step, with those that checked the engine
        self._flops_waiting = 0
        self._tokens = 0  # of training data, each batch once
        self._tokens_forwarded = 0  # through the model, in all queries
        self._forwards_before = 0  # when this call of `train` began
        self._sources: dict[str, str] = {}
        self._base: Any = None  # what the ledger says of the weights that the run began with
        self._own_optimizer = True
        super().__init__(*bound.args, **bound.kwargs)
        refuse_data_parallel(self.args.n_gpu)
        refuse_sharding(self)
        self._own_optimizer = self.optimizer is None
        if not self._own_optimizer:
            refuse_folding(unwrapped(self.optimizer))
        cls = (self.optimizer_cls_and_kwargs or (ZO,))[0]
        if not (isinstance(cls, type) and issubclass(cls, ZO)):
            raise ConfigError(
                f"optimizer_cls_and_kwargs must name zotune.ZO, got {cls}: there are no gradients for it."
            )

    # what the trainer has
    args: Any
    accelerator: Any
    lr_scheduler: Any
    model: Any
    model_init: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    state: Any

    @property
    def zo(self) -> ZO:
        """The optimizer: steps, forwards, ledger, the last step's losses."""
        return unwrapped(self.optimizer)

    # ------------------------------------------------------------------------------------------------------------------
    # A step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a micro-batch; with the last one of a batch, ask for all losses of the step.

        Returns:
            The loss to log, with the last micro-batch: the mean of the unbiased probes over the whole batch. Zero with
            the others.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        parts = int(getattr(self, "current_gradient_accumulation_steps", 1))
        self._micro.append(MicroBatch(inputs, num_items_in_batch, parts))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batch = WholeBatch(self, model, self._micro)
        self._micro = []
        loss = self.zo.query(batch.loss)
        self._step_forwards = batch.forwards
        tokens = self._tokens_of(batch)
        self._tokens += tokens
        self._tokens_forwarded += tokens * batch.forwards
        return loss.to(self.args.device, torch.float32)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make ZO over what the model trains, unless there is one."""
        if self.optimizer is None:
            model = self.model if model is None else model
            self._sources = complete(self.args, model)
            decayed = self.get_decay_parameter_names(model)  # type: ignore[attr-defined]
            cls, options = self.optimizer_cls_and_kwargs or (ZO, {})
            self._sources |= {name: "given" for key, name in GIVEN.items() if key in options}
            options = {"smooth": self.smooth, **options}
            self.optimizer = build_optimizer(self.args, model, decayed, self._make_ledger(model), options, cls)
            refuse_folding(self.optimizer)
            self._tell()
        return self.optimizer

    def _make_ledger(self, model: Any) -> Ledger | None:
        path = ledger_path(self.args)
        if path is None or not self.args.should_save:  # one process writes
            return None
        return Ledger(path, describe_base(model) if self._base is None else self._base)

    def _tell(self) -> None:
        """The settings that decide whether a run learns, with their source, where progress is shown."""
        if self.args.disable_tqdm or not self.args.should_save:
            return
        zo = self.zo
        sites, group = [slot.site for slot in zo.weights], zo.param_groups[0]
        print(
            f"zotune: method {zo.method.name}, rule {zo.rule.name}, {zo.method.forwards_for(sites):g} forwards a step; "
            f"lr {group['lr']:g} ({self._sources['learning_rate']}), eps {group['eps']:g} ({self._sources['eps']}); "
            f"{zo.weights.numel:,} trained parameters"
        )

    # ------------------------------------------------------------------------------------------------------------------
    # A run

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As the trainer's; the ledger goes with it: begun anew, continued, or brought back to the checkpoint."""
        self._set_out(resume_from_checkpoint)
        self._forwards_before = 0 if self.optimizer is None else self.zo.forwards
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)  # type: ignore[misc]
        self._arrive()
        return output

    def _set_out(self, resume: str | bool | None) -> None:
        refuse_first_order(self.args)  # again: attributes may have been set since
        self._micro = []  # of a run that was interrupted
        if self.best_is_back and self._own_optimizer:
            self.optimizer = None  # what it remembers belongs to other weights
        self.best_is_back = False
        path = ledger_path(self.args)
        folder = checkpoint_folder(resume, self.args.output_dir)
        refuse_half_a_checkpoint(folder)
        fresh = self.optimizer is None or self.model_init is not None
        if not fresh and self.zo.ledger is not None:
            self.zo.ledger.close()
        if folder is not None:
            record = read_record(folder)
            self._tokens, self._tokens_forwarded = record.get("tokens", 0), record.get("tokens_forwarded", 0)
        elif fresh:
            self._tokens = self._tokens_forwarded = 0
        self._base = None
        if path is None or not self.args.should_save or not self._own_optimizer:
            return
        if folder is not None:
            self._base = go_back(path, folder)
        elif fresh and not resume:
            begin(path)

    def _arrive(self) -> None:
        best, last = getattr(self.state, "best_global_step", None), self.state.global_step
        self.best_is_back = bool(self.args.load_best_model_at_end and self.state.best_model_checkpoint and best != last)
        if self.zo.ledger is not None:
            if not self.best_is_back:
                slots = self.zo.weights.slots.items()
                digest = weights_hash((name, slot.tensor) for name, slot in slots)
                self.zo.ledger.end(self.zo.describe, self.zo.step_number, digest)
            self.zo.ledger.close()

    # ------------------------------------------------------------------------------------------------------------------
    # What is told and saved

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the optimizer knows; there is no gradient norm."""
        if self.optimizer is not None and "loss" in logs:
            logs.pop("grad_norm", None)
            logs.update(numbers_to_log(self.zo))
            logs["zo/tokens_forwarded"] = self._tokens_forwarded
        if self.optimizer is not None and "train_runtime" in logs:
            forwards = self.zo.forwards - self._forwards_before
            logs["train_forwards"] = forwards
            logs["train_forwards_per_second"] = round(forwards / max(logs["train_runtime"], 1e-9), 3)
        super().log(logs, start_time)  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> int:
        """A third of the trainer's 6 N D for each query: the backward pass, two thirds, does not happen here."""
        self._flops_waiting += super().floating_point_ops(inputs) // 3  # type: ignore[misc]
        if self._micro:  # the batch is not whole yet
            return 0
        waiting, self._flops_waiting = self._flops_waiting, 0
        return int(waiting * self._step_forwards)

    def _tokens_of(self, batch: WholeBatch) -> int:
        """Tokens of a batch, padding included, on all processes."""
        name = getattr(self.model, "main_input_name", "input_ids")
        mains = [micro.inputs.get(name) for micro in batch.parts if isinstance(micro.inputs, Mapping)]
        count = sum(main.numel() for main in mains if isinstance(main, Tensor))
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(torch.tensor([count], device=self.args.device)).sum()
        return int(count)

    def record(self) -> dict[str, Any]:
        """What this run did, in numbers: method, forwards, tokens, eps, lr, seeds and their sources."""
        return make_record(
            self, self.zo, tokens=self._tokens, tokens_forwarded=self._tokens_forwarded, sources=self._sources
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's, with the ledger and what was done beside the model."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.optimizer is not None and self.args.should_save:
            lay_beside(Path(output_dir or self.args.output_dir), ledger_path(self.args), self.record())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's, with what was done and how to cite it."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        if self.optimizer is not None and self.args.should_save:
            complete_card(Path(self.args.output_dir) / "README.md", self.record())


def checkpoint_folder(resume: str | bool | None, output_dir: str) -> Path | None:
    """The checkpoint that the trainer is about to resume from; None if it begins anew, or will say that there is none."""
    if resume is True:
        resume = transformers.trainer_utils.get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    return Path(resume) if resume else None
