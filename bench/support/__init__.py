"""What suites and reports share: contenders, models, and how they are timed."""
