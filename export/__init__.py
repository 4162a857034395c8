"""From a checkpoint directory to a model directory. Import from the modules: `phisight.export.convert` is the top."""
