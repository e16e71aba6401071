"""Commands that train on demonstrations and preferences with TRL: sft and dpo."""
