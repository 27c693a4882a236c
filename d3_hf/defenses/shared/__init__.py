"""What several defences use: geometry, selection of weights, stages before the training, masks."""
