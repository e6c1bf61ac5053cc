// What files are and hold: kinds by their first bytes, the answer's zip, npy arrays as pictures, and curl's words.

const text = (bytes, start, end) => String.fromCharCode(...bytes.subarray(start, end));

// Why a browser cannot show this file as it is, or an empty string.
export async function whyUnseen(file) {
  const head = new Uint8Array(await file.slice(0, 32).arrayBuffer());
  if (["II*\0", "MM\0*", "II+\0", "MM\0+"].includes(text(head, 0, 4))) return "TIFF: no preview here, fused all the same";
  if (text(head, 1, 4) === "PNG" && head[24] === 16) return "16 bits: no preview here, fused all the same";
  return "";
}

// The size of a picture that the browser can show; throws for others.
export async function sizeOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return [image.naturalWidth, image.naturalHeight];
}

// Files of a zip whose entries are stored, as the server writes it: Map of name to Blob.
export async function unzip(blob) {
  const buffer = await blob.arrayBuffer();
  const view = new DataView(buffer), bytes = new Uint8Array(buffer), files = new Map();
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("the answer is no zip");
  let entry = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left; left--) {
    if (view.getUint16(entry + 10, true) !== 0) throw new Error("the zip is compressed");
    const size = view.getUint32(entry + 20, true), local = view.getUint32(entry + 42, true);
    const [nameSize, extraSize, noteSize] = [28, 30, 32].map(offset => view.getUint16(entry + offset, true));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    files.set(text(bytes, entry + 46, entry + 46 + nameSize), blob.slice(start, start + size));
    entry += 46 + nameSize + extraSize + noteSize;
  }
  return files;
}

// A PNG of a uint8 npy array, (H, W) or (H, W, 3), in C order.
export async function pictureOfNpy(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const start = 10 + bytes[8] + 256 * bytes[9];
  const header = text(bytes, 10, start);
  const shape = /'shape': \(([\d, ]+)\)/.exec(header)?.[1].split(",").filter(part => part.trim()).map(Number) ?? [];
  const [height, width, channels = 1] = shape;
  if (text(bytes, 1, 6) !== "NUMPY" || !header.includes("'|u1'") || bytes.length - start !== height * width * channels)
    throw new Error("the array is of another kind than expected");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
  for (let from = start, to = 0; to < pixels.data.length; from += channels, to += 4) {
    for (let channel = 0; channel < 3; channel++) pixels.data[to + channel] = bytes[from + Math.min(channel, channels - 1)];
    pixels.data[to + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return new Promise(resolve => canvas.toBlob(resolve));
}

// One word for a POSIX shell.
export const quoted = word => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

// A file form field in curl's own notation, in which ; and , have a meaning.
const fileField = (name, path) =>
  `${name}=@${/[;,"\\]|^-$|^\s|\s$/.test(path) ? `"${path.replace(/["\\]/g, "\\$&")}"` : path}`;

// The commands that do what the page does. vis, ir: { name, href } with href for a file to be downloaded first.
export function curlOf({ vis, ir, options, needsKey, output, address }) {
  const lines = [];
  const samples = [vis, ir].filter(picture => picture.href);
  if (samples.length) lines.push(`curl -fsS ${samples.map(picture => `-O ${quoted(picture.href)}`).join(" \\\n  ")} &&`);
  lines.push(`curl -sS --fail-with-body -o ${quoted(output)} \\`);
  if (needsKey) lines.push('  -H "Authorization: Bearer $RECOFUSE_API_KEY" \\');
  lines.push(`  -F ${quoted(fileField("vis", vis.name))} \\`, `  -F ${quoted(fileField("ir", ir.name))} \\`);
  const fields = options.map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`);
  if (fields.length) lines.push(`  ${fields.join(" ")} \\`);
  lines.push(`  ${quoted(address)}`);
  return lines.join("\n");
}
