"""Victims: classifiers with a planted backdoor, made to measure defences on."""
