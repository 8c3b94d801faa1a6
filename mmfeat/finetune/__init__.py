"""Fine-tuning: stage 2 trains the last layers of encoders together with a head, from cached prefixes where it can."""
