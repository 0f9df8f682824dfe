"""From rollouts, routing and evidence to the loss of the student."""
