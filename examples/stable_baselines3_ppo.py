"""PPO of Stable-Baselines3: a callback, whose state is saved and loaded with the agent.

Shows: ``callback=SpectralCallback(...)``, metrics in the agent's logger, and an agent that goes on
learning after ``PPO.load`` with the vectors it was saved with. SpectralAdamW instead of the
callback: ``--optimizer``. (SAC: see ``help(spectral_kernels.integrations.stable_baselines3)``.)

    pip install 'spectral_kernels[stable-baselines3]'
    python examples/stable_baselines3_ppo.py --steps 8192
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from stable_baselines3 import PPO

from spectral_kernels import SpectralAdamW, spectral_norms
from spectral_kernels.integrations.stable_baselines3 import SpectralCallback


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8192, help="of the environment, in all")
    parser.add_argument("--strength", type=float, default=1e-3)
    parser.add_argument("--optimizer", action="store_true", help="SpectralAdamW, not the callback")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    policy = {"net_arch": [64, 64]}
    if options.optimizer:
        policy["optimizer_class"] = SpectralAdamW
        policy["optimizer_kwargs"] = {"strength": options.strength, "weight_decay": 0.0}
        callback = None
    else:
        callback = SpectralCallback(strength=options.strength)
    agent = PPO("MlpPolicy", "CartPole-v1", n_steps=512, batch_size=64, learning_rate=1e-3,
                seed=options.seed, device="cpu", policy_kwargs=policy, verbose=0)  # fmt: skip
    print(f"at first:   largest sigma {max(spectral_norms(agent.policy).values()):.3f}")

    agent.learn(options.steps // 2, callback=callback)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent.zip"
        agent.save(path)  # with the vectors
        agent = PPO.load(path, env=agent.get_env(), device="cpu")
    print(f"half way:   largest sigma {max(spectral_norms(agent.policy).values()):.3f}, "
          f"loaded: {getattr(agent, 'spectral_kernels', 'vectors in the optimizer')}")  # fmt: skip

    again = None if options.optimizer else SpectralCallback(strength=options.strength)
    agent.learn(options.steps - options.steps // 2, callback=again, reset_num_timesteps=False)
    episodes = [episode["r"] for episode in agent.ep_info_buffer]
    reached = sum(episodes) / max(1, len(episodes))
    largest = max(spectral_norms(agent.policy).values())
    print(f"at the end: largest sigma {largest:.3f}, return {reached:.1f}")
    return {"return": reached, "sigma_max": largest}


if __name__ == "__main__":
    main()
