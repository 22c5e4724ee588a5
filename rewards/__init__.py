"""What makes an output good: a registry of rewards. `from rewards import get_reward`."""

from __future__ import annotations

from rewards.base import REWARDS, Reward, RewardCard, get_reward, list_rewards, register
from rewards.catalogue import BUILT_IN

__all__ = ["BUILT_IN", "REWARDS", "Reward", "RewardCard", "get_reward", "list_rewards", "register"]
