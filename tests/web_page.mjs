// Open the page in Chromium, give it a file or the microphone, and print its text and status as JSON.
//
//     node web_page.mjs PLAYWRIGHT CHROMIUM URL FILE|microphone|none [PICTURE.png]

import {writeFileSync} from 'node:fs';

const PATIENCE = 240000; // milliseconds, enough on a busy machine
const [playwright, executablePath, url, heard, picture] = process.argv.slice(2);
const {chromium} = await import(playwright);
const args = ['--disable-background-networking', '--disable-component-update', '--disable-gpu', '--no-first-run'];
if (heard === 'microphone') args.push('--use-fake-ui-for-media-stream', '--use-fake-device-for-media-stream');
const browser = await chromium.launch({executablePath, args, chromiumSandbox: false});
try {
  const page = await browser.newPage({viewport: {width: 960, height: 760}, deviceScaleFactor: 2});
  page.setDefaultTimeout(PATIENCE);
  const errors = [];
  page.on('pageerror', (error) => errors.push(error.message));
  const settled = () => page.waitForFunction(() => !document.body.hasAttribute('data-busy'), undefined, {timeout: PATIENCE});
  await page.goto(url);
  if (heard !== 'none') await settled();
  if (heard === 'microphone') {
    await page.getByRole('button', {name: 'Microphone'}).click();
    await page.waitForTimeout(3000);
    await page.getByRole('button', {name: 'Stop'}).click();
    await settled();
  } else if (heard === 'none') {
    await page.getByText('python -m speechbrain_ext export').waitFor();
  } else {
    await page.getByLabel('Open a file').setInputFiles(heard);
    await page.getByRole('button', {name: 'Copy text', disabled: false}).or(page.locator('#status.error')).waitFor({timeout: PATIENCE});
    await settled();
  }
  const text = await page.locator('#words span').allInnerTexts();
  if (picture) writeFileSync(picture, await page.screenshot());
  console.log(JSON.stringify({text: text.join(' '), status: await page.getByRole('status').innerText(), errors}));
} finally {
  await browser.close();
}
