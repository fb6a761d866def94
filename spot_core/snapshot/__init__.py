"""From live training state to native files: what to capture, host buffers, the overlapped copy, the writer."""
