"""The callback for agents of Stable-Baselines3, on small ones."""

import numpy as np
import pytest
import torch

from spectral_kernels import SpectralAdamW, SpectralRegularizer

sb3 = pytest.importorskip("stable_baselines3")
gymnasium = pytest.importorskip("gymnasium")

from stable_baselines3.common import callbacks  # noqa: E402
from stable_baselines3.common.logger import KVWriter, Logger, filter_excluded_keys  # noqa: E402
from stable_baselines3.common.utils import set_random_seed  # noqa: E402
from stable_baselines3.sac.policies import SACPolicy  # noqa: E402

from spectral_kernels.integrations.stable_baselines3 import SpectralCallback  # noqa: E402

pytestmark = pytest.mark.takes_seconds
OFF_POLICY = {"learning_starts": 8, "batch_size": 8, "buffer_size": 100}
KINDS = {
    "PPO": ("CartPole-v1", {"n_steps": 32, "batch_size": 16, "n_epochs": 2}),
    "A2C": ("CartPole-v1", {"n_steps": 8}),
    "DQN": ("CartPole-v1", {**OFF_POLICY, "train_freq": 1, "target_update_interval": 10}),
    "TD3": ("Pendulum-v1", OFF_POLICY),
    "SAC": ("Pendulum-v1", OFF_POLICY),
}


def agent_of(kind="PPO", policy="MlpPolicy", lr=1e-2, **policy_kwargs):
    """A new agent, the same each time."""
    env, options = KINDS[kind]
    return getattr(sb3, kind)(
        policy, env, learning_rate=lr, seed=0, device="cpu", **options,
        policy_kwargs={"net_arch": [8], **policy_kwargs},
    )  # fmt: skip


def parameters(agent):
    return {name: p.detach().clone() for name, p in agent.policy.named_parameters()}


def same(one, other):
    a, b = parameters(one), parameters(other)
    assert list(a) == list(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def go_on(agent, steps, callback=None):
    """Learn in an environment that is made anew, with the random numbers of a new process."""
    set_random_seed(3)
    env = gymnasium.make(KINDS[type(agent).__name__][0])
    env.reset(seed=3)
    agent.set_env(env)
    agent.set_random_seed(3)
    return agent.learn(steps, callback=callback, reset_num_timesteps=False)


class Recorded(KVWriter):
    """What a logger writes, less what is not meant for the terminal."""

    def __init__(self):
        self.rows, self.shown = [], []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))
        self.shown.append(filter_excluded_keys(key_values, key_excluded, "stdout"))

    def close(self):
        pass


def logged(agent):
    """Let an agent log into what is returned."""
    found = Recorded()
    agent.set_logger(Logger(None, [found]))
    return found


class Failing(callbacks.BaseCallback):
    """Raises an error after some steps."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def _on_step(self):
        if self.n_calls == self.steps:
            raise ArithmeticError("enough")
        return True


def test_the_steps_are_those_of_attach():
    ours = agent_of().learn(96, callback=SpectralCallback(strength=0.5))
    other = agent_of()
    SpectralRegularizer(other.policy, strength=0.5).attach(other.policy.optimizer)
    other.learn(96)
    assert same(ours, other)
    assert not same(ours, agent_of().learn(96))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_optimizers_hold_has_the_penalty_and_targets_have_none(kind):
    largest = {}
    for strength in (0.0, 10.0):
        agent = agent_of(kind)
        callback = SpectralCallback(strength=strength, target=0.1, warmup=50)
        agent.learn(64, callback=callback)
        names = callback.regularizer.names
        assert len(names) >= 2
        assert not [name for name in names if "target" in name]
        largest[strength] = float(callback.regularizer.sigma.max())
    held = {"DQN": "q_net.", "TD3": ("actor.", "critic."), "SAC": ("actor.", "critic.")}
    assert all(name.startswith(held.get(kind, "")) for name in names)
    assert largest[10.0] < 0.8 * largest[0.0]


@pytest.mark.parametrize("kind", ["PPO", "SAC"])
def test_a_saved_agent_goes_on_with_the_same_bits(kind, tmp_path):
    options = {"strength": 0.5, "target": "initial"}
    whole, callback = agent_of(kind), SpectralCallback(**options)
    whole.learn(64, callback=callback)
    whole.save(tmp_path / "agent")
    if kind == "SAC":
        whole.save_replay_buffer(tmp_path / "buffer")
    loaded = type(whole).load(tmp_path / "agent", device="cpu")
    if kind == "SAC":
        loaded.load_replay_buffer(tmp_path / "buffer")
    again = SpectralCallback(**options)
    go_on(loaded, 64, again)
    go_on(whole, 64, callback)
    assert torch.equal(again.regularizer.sigma, callback.regularizer.sigma)
    assert again.regularizer.state_dict()["initial"] == callback.regularizer.state_dict()["initial"]
    assert same(loaded, whole)


def test_an_agent_that_was_saved_without_the_state_is_warmed_up(tmp_path):
    agent = agent_of()
    agent.learn(32, callback=SpectralCallback())
    agent.save(tmp_path / "agent", exclude=["spectral_kernels"])
    loaded = sb3.PPO.load(tmp_path / "agent", device="cpu")
    assert not hasattr(loaded, "spectral_kernels")
    callback = SpectralCallback(warmup=100)
    go_on(loaded, 0, callback)
    exact = torch.linalg.svdvals(loaded.policy.action_net.weight.detach())[0]
    found = callback.regularizer.sigma[callback.regularizer.names.index("action_net.weight")]
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)


def test_what_a_checkpoint_callback_saves_has_the_state_of_that_moment(tmp_path):
    agent, callback = agent_of(), SpectralCallback(strength=0.5)
    saving = callbacks.CheckpointCallback(save_freq=64, save_path=tmp_path)
    agent.learn(64, callback=callbacks.CallbackList([callback, saving]))
    loaded = sb3.PPO.load(tmp_path / "rl_model_64_steps", device="cpu")
    (state,) = loaded.spectral_kernels.values()
    # It saves in the 64th step, before the second update.
    first, once = agent_of(), SpectralCallback(strength=0.5)
    first.learn(32, callback=once)
    expected = once.regularizer.state_dict()["vectors"]
    assert "4 matrices" in repr(state)
    for name, vector in state.state()["vectors"].items():
        assert torch.equal(vector, expected[name])


def test_learning_in_parts_is_learning_at_once():
    """Also with a new callback for a part, which goes on with the vectors of the one before."""
    whole, callback = agent_of(), SpectralCallback(strength=0.5)
    whole.learn(96, callback=callback)
    parts = agent_of()
    first, last = SpectralCallback(strength=0.5), SpectralCallback(strength=0.5)
    for one in (first, first, last):
        parts.learn(32, callback=one, reset_num_timesteps=False)
        assert not one.regularizer._buckets.in_steps[-1].is_active
    assert same(whole, parts)
    assert last.regularizer is not first.regularizer
    assert torch.equal(callback.regularizer.sigma, last.regularizer.sigma)
    assert not parts.policy.optimizer._optimizer_step_pre_hooks
    assert not parts.policy.optimizer._optimizer_step_post_hooks


def failed(callback, steps=20):
    """An agent whose learn() has raised an error, by default before the first update."""
    agent = agent_of()
    with pytest.raises(ArithmeticError):
        agent.learn(96, callback=[*callback, Failing(steps)])
    return agent


def test_after_a_failure_the_next_steps_have_no_penalty():
    plain, callback = go_on(failed([]), 64), SpectralCallback(strength=0.5)
    agent = failed([callback])
    assert callback.regularizer._buckets.in_steps[-1].is_active
    go_on(agent, 64)
    assert not callback.regularizer._buckets.in_steps[-1].is_active
    assert same(plain, agent)
    callback.on_training_end()
    assert not agent.policy.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("is_new", [False, True])
def test_after_a_failure_the_penalty_of_a_callback_counts_once(is_new):
    expected = go_on(failed([]), 64, SpectralCallback(strength=0.5))
    callback = SpectralCallback(strength=0.5)
    agent = failed([callback])
    go_on(agent, 64, SpectralCallback(strength=0.5) if is_new else callback)
    assert same(expected, agent)
    assert not agent.policy.optimizer._optimizer_step_pre_hooks


def test_evaluation_and_progress_may_stand_beside_it(tmp_path):
    agent, callback = agent_of(), SpectralCallback(strength=0.5)
    evaluating = callbacks.EvalCallback(
        gymnasium.make("CartPole-v1"), n_eval_episodes=1, eval_freq=32, verbose=0,
        best_model_save_path=tmp_path,
    )  # fmt: skip
    agent.learn(64, callback=[evaluating, callback])
    best = sb3.PPO.load(tmp_path / "best_model", device="cpu")
    assert list(best.spectral_kernels) == ["spectral"]


# -------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("kind", ["PPO", "DQN"])
def test_metrics_go_to_the_logger_of_the_agent(kind):
    agent = agent_of(kind)
    found = logged(agent)
    callback = SpectralCallback(per_layer=True, prefix="mine")
    agent.learn(160, callback=callback, log_interval=1)
    assert len(found.rows) >= 3
    names = callback.regularizer.names
    for row, shown in zip(found.rows, found.shown, strict=True):
        assert row["mine/sigma_max"] == max(row[f"mine/sigma/{name}"] for name in names)
        assert "mine/sigma_max" in shown
        assert not [name for name in shown if name.startswith("mine/sigma/")]
    assert len({row["mine/sigma_max"] for row in found.rows}) == len(found.rows)


def test_a_table_on_the_terminal_takes_the_metrics_of_every_layer(capsys):
    agent = agent_of()
    agent.verbose = 1
    agent.learn(32, callback=SpectralCallback(per_layer=True))
    assert "sigma_median" in capsys.readouterr().out


def test_actor_and_critic_may_have_callbacks_of_their_own():
    agent = agent_of("SAC")
    found = logged(agent)
    actor, critic = (
        SpectralCallback(optimizer=f"{name}.optimizer", prefix=name, strength=strength)
        for name, strength in (("actor", 1e-4), ("critic", 1e-2))
    )
    agent.learn(200, callback=[actor, critic], log_interval=1)
    assert {name.partition(".")[0] for name in actor.regularizer.names} == {"actor"}
    assert {name.partition(".")[0] for name in critic.regularizer.names} == {"critic"}
    (row,) = found.rows
    assert row["actor/sigma_max"] > 0
    assert row["critic/penalty"] > 0
    assert set(agent.spectral_kernels) == {"actor", "critic"}


# --------------------------------------------------------------------------------------- errors


def test_two_callbacks_of_one_prefix_are_refused():
    agent = agent_of("SAC")
    given = [SpectralCallback(optimizer=f"{name}.optimizer") for name in ("actor", "critic")]
    with pytest.raises(ValueError, match=r"^prefix: expected .*, got 'spectral'$"):
        agent.learn(8, callback=given)
    assert agent.learn(8, callback=given[1]) is agent


def test_an_optimizer_that_is_not_there_is_told():
    callback = SpectralCallback(optimizer="actor.optimizer")
    message = r"^optimizer: expected 'policy\.optimizer', got 'actor\.optimizer'$"
    with pytest.raises(ValueError, match=message):
        agent_of().learn(32, callback=callback)


def test_an_argument_that_does_not_exist_is_told_at_once():
    with pytest.raises(TypeError, match=r"^SpectralCallback: .*did you mean 'strength'"):
        SpectralCallback(strenght=1.0)


def test_what_cannot_be_attached_leaves_no_hook():
    agent = agent_of()
    reg = SpectralRegularizer(agent.policy)
    handle = reg.attach(agent.policy.optimizer)
    before = len(agent.policy.optimizer._optimizer_step_pre_hooks)
    with pytest.raises(RuntimeError, match="gets a penalty in the steps of Adam already"):
        agent.learn(32, callback=SpectralCallback())
    assert len(agent.policy.optimizer._optimizer_step_pre_hooks) == before
    handle.remove()
    agent.learn(32, callback=SpectralCallback())


# -------------------------------------------------------------------------------- SpectralAdamW


class Policy(SACPolicy):
    """That of SAC with optimizers whose steps have the penalty."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        for network in (self.actor, self.critic):
            network.optimizer = SpectralAdamW(network, lr=lr_schedule(1), strength=0.5)


def with_spectral_adamw(kind):
    if kind == "SAC":
        return agent_of(kind, Policy)
    options = {"strength": 0.5}
    return agent_of(kind, optimizer_class=SpectralAdamW, optimizer_kwargs=options)


def optimizers(agent):
    found = [getattr(module, "optimizer", None) for module in agent.policy.modules()]
    return [one for one in found if one is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_with_spectral_adamw_is_saved_and_loaded(kind, tmp_path):
    agent = with_spectral_adamw(kind)
    assert all(type(one) is SpectralAdamW for one in optimizers(agent))
    agent.learn(64)
    agent.save(tmp_path / "agent")
    if isinstance(agent, sb3.common.off_policy_algorithm.OffPolicyAlgorithm):
        agent.save_replay_buffer(tmp_path / "buffer")
    loaded = type(agent).load(tmp_path / "agent", device="cpu")
    assert all(type(one) is SpectralAdamW for one in optimizers(loaded))
    if (tmp_path / "buffer.pkl").exists():
        loaded.load_replay_buffer(tmp_path / "buffer")
    for one, other in zip(optimizers(agent), optimizers(loaded), strict=True):
        assert one.names == other.names
        assert torch.equal(one.sigma, other.sigma)
    go_on(agent, 64)
    go_on(loaded, 64)
    assert same(agent, loaded)
    assert not same(agent, agent_of(kind))


def test_with_spectral_adamw_it_logs_alone():
    agent = with_spectral_adamw("PPO")
    found, callback = logged(agent), SpectralCallback()
    agent.learn(64, callback=callback)
    assert callback.regularizer is agent.policy.optimizer.regularizer
    assert np.isfinite(found.rows[-1]["spectral/sigma_max"])
    assert not agent.spectral_kernels
    with pytest.raises(ValueError, match=r"^strength: SpectralAdamW has the penalty in its step"):
        agent.learn(64, callback=SpectralCallback(strength=1.0))
    two = with_spectral_adamw("SAC")
    with pytest.raises(ValueError, match=r"^optimizer: expected one of 'actor\.optimizer' and"):
        two.learn(8, callback=SpectralCallback())
    two.learn(8, callback=SpectralCallback(optimizer="critic.optimizer"))
