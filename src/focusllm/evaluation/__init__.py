"""Measuring: tasks (what is asked), methods (how long text reaches the model), one runner, one report."""
