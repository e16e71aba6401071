"""PPO beside PPO-ptx: the likelihood of a mix of texts, and the reward."""
