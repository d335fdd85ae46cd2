"""A callback for the agents of Stable-Baselines3.

SpectralAdamW and SpectralSGD are an alternative: ``policy_kwargs={"optimizer_class": SpectralAdamW,
"optimizer_kwargs": {"strength": 1e-4}}``. The policy of SAC passes a list of parameters to that
class, without names; there the optimizers are made in a policy of one's own, which is saved and
loaded with the agent::

    class Policy(SACPolicy):
        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            for network in (self.actor, self.critic):
                network.optimizer = SpectralAdamW(network, lr=lr_schedule(1), strength=1e-4)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from ..optim.base import SpectralOptimizer
from ..optim.groups import not_in
from ..regularizer import SpectralRegularizer
from ..selection.arguments import check_pattern_list, known_keywords
from .session import RegularizerOptions, Session

ATTRIBUTE = "spectral_kernels"  # of an agent: a dict from the prefix of a callback to its state


class SpectralCallback(BaseCallback):
    """Regularizes the policy of an agent, logs metrics, and saves its state with the agent.

    ``agent.learn(100_000, callback=SpectralCallback(strength=1e-4))``. The penalty counts once per
    optimizer step, outside of gradient clipping, as with ``SpectralRegularizer.attach``. What is
    regularized is what the policy's optimizers hold: of PPO and A2C the whole policy, of DQN the
    Q-network, of SAC and TD3 actor and critic; target networks and the entropy coefficient are left
    alone. ``reg.metrics()`` go to the agent's logger, after every rollout, or, off policy, at the
    end of every episode.

    ``agent.save(path)`` saves all attributes of an agent, and the vectors of the power iteration
    are among them, as ``agent.spectral_kernels[prefix]``. A later ``learn`` of this agent, or of
    the one that ``PPO.load(path)`` returns, goes on with them if it is given a callback with the
    same ``prefix``: this one or a new one. Without them they are warmed up.

    The penalty ends with ``learn``. One that raised an error leaves the optimizer's hooks until the
    next ``learn`` of the agent begins, whose steps have no penalty unless it has a callback too;
    ``callback.on_training_end()`` removes them at once.

    With SpectralAdamW or SpectralSGD as the policy's optimizer, it only logs.

    Args:
        per_layer: log sigma and residual / sigma of every matrix too; not on the terminal, whose
            tables have no room for such names.
        prefix: what the names of the metrics begin with; of several callbacks each has its own.
        optimizer: name of the optimizer to attach to, as in ``agent.get_parameters()``, such as
            "critic.optimizer", or several names; only what they hold is regularized. None: all
            optimizers of the policy.
        decoupled: let the penalty act on the weights, as ``SpectralRegularizer.attach`` says.
        constraint: with ``decoupled``, "cap" or "sphere" in place of the penalty, see there.
        verbose: that of ``BaseCallback``.
        **arguments: arguments of SpectralRegularizer, without the model. Patterns are for the names
            in ``agent.policy.named_parameters()``.

    Raises:
        TypeError: an argument that SpectralRegularizer does not have, or a ``constraint`` that is
            no string.
        ValueError: another ``constraint``, or one without ``decoupled``. Other values are checked
            when training begins.
    """

    @known_keywords
    def __init__(
        self,
        *,
        per_layer: bool = False,
        prefix: str = "spectral",
        optimizer: str | Sequence[str] | None = None,
        decoupled: bool = False,
        constraint: Literal["cap", "sphere"] | None = None,
        verbose: int = 0,
        **arguments: Unpack[RegularizerOptions],
    ) -> None:
        super().__init__(verbose)
        self._wanted = check_pattern_list("optimizer", optimizer)
        self.per_layer, self.prefix, self.optimizer = per_layer, prefix, optimizer
        self._session = Session(arguments, decoupled, constraint)
        self._begun = 0  # when the learn() of which this is a part began
        self._handles: list[RemovableHandle] = []

    @property
    def regularizer(self) -> SpectralRegularizer | None:
        """The regularizer; None before training has begun for the first time."""
        return self._session.regularizer

    def _on_training_start(self) -> None:
        """Build and attach the regularizer, and load the state that the agent has."""
        policy = getattr(self.model.policy, "_orig_mod", self.model.policy)  # if it is compiled
        present = _optimizers_of(policy)
        own = self._own(present)
        states = self._states()
        before, last = states.get(self.prefix), self.regularizer
        state = before.state() if before is not None else None
        self._end()
        groups = [group for optimizer in own for group in optimizer.param_groups]
        self._begun = self.model.start_time
        try:
            if not any(isinstance(optimizer, SpectralOptimizer) for optimizer in own):
                self._handles = [o.register_step_pre_hook(self._stop_if_left) for o in own]
            regularizer = self._session.begin(
                policy, own, list(present.values()), absent=not_in(groups, policy)
            )
            if self._session.is_own and regularizer is not last and state is not None:
                regularizer.load_state_dict(state)
        except BaseException:
            self._end()
            raise
        states.pop(self.prefix, None)
        if self._session.is_own:
            states[self.prefix] = _State(None, self)

    def _own(self, present: dict[str, torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Return those of the policy's optimizers to attach to."""
        wanted = list(present) if self._wanted is None else self._wanted
        accepted = " and ".join(map(repr, present)) or "nothing, as the policy has no optimizer"
        for name in wanted or [None]:
            if name not in present:
                raise ValueError(f"optimizer: expected {accepted}, got {name!r}")
        own = [present[name] for name in wanted]
        if len(own) > 1 and any(isinstance(one, SpectralOptimizer) for one in own):
            kinds = ", ".join(type(one).__name__ for one in own)
            raise ValueError(
                f"optimizer: expected one of {accepted}, as each has a penalty of its own "
                f"({kinds}), got {self.optimizer!r}"
            )
        return own

    def _states(self) -> dict[str, _State]:
        """Return the states that the agent keeps; callbacks of a learn() that failed end."""
        states: dict[str, _State] = self.model.__dict__.setdefault(ATTRIBUTE, {})
        for prefix, state in states.items():
            other = state.callback
            if other is None or other is self:
                continue
            if other._begun != self.model.start_time:
                other._end()
            elif prefix == self.prefix:
                raise ValueError(
                    f"prefix: expected one that no other SpectralCallback of this learn() has, got "
                    f"{prefix!r}"
                )
        return states

    def _stop_if_left(self, *_: Any) -> None:
        """Before a step: add no penalty if the learn() of this callback has failed."""
        if self.model.start_time != self._begun:
            self._session.stop()

    def _on_step(self) -> bool:
        if isinstance(self.model, OffPolicyAlgorithm) and any(self.locals["dones"]):
            self._log()  # what follows an episode is written before the rollout ends
        return True

    def _on_rollout_end(self) -> None:
        if not isinstance(self.model, OffPolicyAlgorithm):
            self._log()

    def _log(self) -> None:
        regularizer = self.regularizer
        assert regularizer is not None
        for name, value in regularizer.metrics(self.per_layer, self.prefix).items():
            is_of_layer = "/" in name.removeprefix(f"{self.prefix}/")
            # Two names that a table cuts to the same one are an error of the logger.
            self.logger.record(name, value, ("stdout", "log") if is_of_layer else None)

    def _on_training_end(self) -> None:
        """Detach the regularizer."""
        self._end()

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._session.end()


class _State:
    """The state of a callback's regularizer, as an attribute of the agent, which pickles it.

    Args:
        saved: a state that was loaded with the agent.
        callback: or the callback whose regularizer has the state.
    """

    def __init__(self, saved: dict[str, Any] | None, callback: SpectralCallback | None = None):
        self._saved, self.callback = saved, callback
        self._regularizer = None if callback is None else callback.regularizer

    def state(self) -> dict[str, Any] | None:
        """Return the present state of the regularizer, or the one that was loaded."""
        return self._saved if self._regularizer is None else self._regularizer.state_dict()

    def __reduce__(self) -> tuple[type[_State], tuple[Any]]:
        return _State, (_on_cpu(self.state()),)

    def __repr__(self) -> str:
        return f"vectors of {len((self.state() or {}).get('vectors', ()))} matrices"


def _on_cpu(value: Any) -> Any:
    """Return a state with its tensors on the CPU, for machines without the device."""
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _optimizers_of(policy: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers of a policy and of its networks, by their names in the agent."""
    found = {}
    for name, module in policy.named_modules():
        optimizer = getattr(module, "optimizer", None)
        if isinstance(optimizer, torch.optim.Optimizer):
            found[f"{name or 'policy'}.optimizer"] = optimizer
    return found
