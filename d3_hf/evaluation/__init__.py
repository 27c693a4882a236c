"""Measuring: ACC, ASR, RA and DER, guard rails, whether a retain set is fit, landscapes."""
