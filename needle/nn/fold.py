"""fold_batchnorm."""


def fold_batchnorm(): ...
