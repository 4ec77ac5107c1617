"""The words that client and server share: cameras, images, groups, scores, results, events. No I/O."""
