"""Search spaces: functions that return a space for `search_hyperparameters` or `search_architecture`."""
