"""Where training is in its data, and how a new process gets back there exactly."""
