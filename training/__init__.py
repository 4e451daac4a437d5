"""What training needs beside the model: settings, optimiser, thinned windows, evaluation."""
