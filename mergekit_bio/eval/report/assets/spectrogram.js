"use strict";
// A spectrogram of a recording in the page: decoded by the browser at 16 kHz, which is what the model hears.
const RATE = 16000, WINDOW = 512, COLUMNS = 900, RANGE = 75;  // Hz, samples, pixels, dB below the loudest
// From quiet to loud: dark blue, purple, orange, pale yellow.
const SHADES = [[11, 8, 36], [49, 17, 92], [98, 25, 120], [152, 42, 111], [204, 66, 81], [242, 113, 45], [251, 178, 56], [252, 246, 190]];

function shade(loudness) {
  const place = Math.min(Math.max(loudness, 0), 1) * (SHADES.length - 1), low = Math.min(Math.floor(place), SHADES.length - 2);
  return SHADES[low].map((from, part) => from + (place - low) * (SHADES[low + 1][part] - from));
}

// In place, of WINDOW complex numbers: Cooley and Tukey 1965.
function fourier(real, imaginary) {
  for (let index = 1, mirrored = 0; index < WINDOW; index++) {
    let bit = WINDOW >> 1;
    for (; mirrored & bit; bit >>= 1) mirrored ^= bit;
    mirrored ^= bit;
    if (index < mirrored) {
      [real[index], real[mirrored]] = [real[mirrored], real[index]];
      [imaginary[index], imaginary[mirrored]] = [imaginary[mirrored], imaginary[index]];
    }
  }
  for (let length = 2; length <= WINDOW; length <<= 1) {
    const half = length / 2;
    for (let turn = 0; turn < half; turn++) {
      const angle = -2 * Math.PI * turn / length, cosine = Math.cos(angle), sine = Math.sin(angle);
      for (let first = turn; first < WINDOW; first += length) {
        const second = first + half;
        const x = real[second] * cosine - imaginary[second] * sine, y = real[second] * sine + imaginary[second] * cosine;
        real[second] = real[first] - x; imaginary[second] = imaginary[first] - y;
        real[first] += x; imaginary[first] += y;
      }
    }
  }
}

// Decibels, a column after the other, each from 0 to 8 kHz.
function decibels(samples) {
  const columns = [], step = Math.max(1, (samples.length - WINDOW) / (COLUMNS - 1));
  const taper = Float64Array.from({length: WINDOW}, (_, index) => 0.5 - 0.5 * Math.cos(2 * Math.PI * index / WINDOW));
  for (let column = 0; column < COLUMNS; column++) {
    const start = Math.round(column * step), real = new Float64Array(WINDOW), imaginary = new Float64Array(WINDOW);
    for (let index = 0; index < WINDOW; index++) real[index] = (samples[start + index] || 0) * taper[index];
    fourier(real, imaginary);
    columns.push(Float64Array.from({length: WINDOW / 2}, (_, bin) => 10 * Math.log10(real[bin] ** 2 + imaginary[bin] ** 2 + 1e-12)));
  }
  return columns;
}

// Draws the recording behind a data URL, and gives its seconds.
async function drawSpectrogram(canvas, source) {
  const bytes = Uint8Array.from(atob(source.split(",")[1]), letter => letter.charCodeAt(0));
  const recording = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes.buffer);
  const columns = decibels(recording.getChannelData(0)), bins = WINDOW / 2;
  let loudest = -Infinity;
  for (const column of columns) for (const value of column) loudest = Math.max(loudest, value);
  canvas.width = COLUMNS; canvas.height = bins;
  const picture = new ImageData(COLUMNS, bins);
  columns.forEach((column, x) => column.forEach((value, bin) => {
    picture.data.set([...shade(1 + (value - loudest) / RANGE), 255], 4 * ((bins - 1 - bin) * COLUMNS + x));
  }));
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return recording.duration;
}
