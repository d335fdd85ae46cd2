"""Callbacks for the trainers of other libraries, which are not imported with the package."""
