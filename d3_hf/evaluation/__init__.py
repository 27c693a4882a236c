"""Measuring: ACC, ASR, RA, PACC and DER, guard rails, whether a retain set is fit, landscapes."""
