"""Image streams: any method by name on digits, MNIST, CIFAR-100 and others."""
