"""The page of `apportion evaluate` on several policies, and its pages of token heat maps."""
