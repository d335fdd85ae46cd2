"""Do networks keep learning? A benchmark of methods on tasks that change: see README.md."""
